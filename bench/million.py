"""A million chats through the whole job: score, select, curated shards, report; with its driver killed half way.

`--rows` conversations of random words are generated in `--shards` Parquet files by two processes. Then
`curate run …` scores them by a tiny model's vector filter and response length, in a process of its own, until half of
the parts are committed, when it gets SIGKILL; the same command then goes on to the end. Prints JSON lines, and with
`--table` writes the figures as a Markdown table. The model costs next to nothing: what is measured is everything else.

    python -m bench.million --folder /somewhere/million --table million.md > million.jsonl
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from bench import demo_rows, tiny_model
from bench.common import GIB, MemorySample, emit, machine, series
from bench.stream import vocabulary, write_shard
from bench.watched import Commit, Watched, commits, folder_bytes, run_job, scored_rows
from curate.concepts import concept as concept_files
from curate.models.load import ModelSpec

BENCH = "million"
GROUPS = ("driver", "scorers", "readers", "daemons")
MIB = 2**20


def generate(folder: Path, rows: int, shards: int, seed: int, processes: int) -> float:
    """Write the corpus, or find the same one there; returns seconds."""
    made = {"rows": rows, "shards": shards, "seed": seed}
    marker = folder.with_suffix(".json")
    if marker.exists() and json.loads(marker.read_text()) == made:
        return 0.0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    one = partial(write_shard, folder, rows, shards, seed, words=vocabulary())
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(one, range(shards)))
    marker.write_text(json.dumps(made))
    return time.perf_counter() - began


def job_options(work: Path, corpus: Path, args: argparse.Namespace) -> list[str]:
    """Make the model and its concept, and say how the job is called."""
    path = work / "model"
    if not path.exists():
        tiny_model.save(path, vocabulary(), args.layers, args.width)
    model = ModelSpec(str(path), dtype="float32", device="cpu")
    concept, _ = demo_rows.random_concept(model, max(1, args.layers - 1), args.seed)
    concept_files.save(concept, str(work / "concept"))
    given: dict[str, Any] = {
        "source": "files",
        "source.url": corpus,
        "source.unit_rows": args.unit_rows,
        "model": "hf",
        "model.path": path,
        "model.dtype": "float32",
        "concept": "[file]",
        "concept.file.path": work / "concept",
        "scorer": "[vector_filter,response_length]",
        "selector.fraction": args.fraction,
        "sink.url": work / "out",
        "sink.store": work / "store",
        "cluster.cpus": args.cpus,
        "cluster.workers": args.workers,
        "cluster.readers": args.readers,
        "cluster.object_store_gb": args.object_store_gb,
    }
    if args.inline:
        given = {k: v for k, v in given.items() if not k.startswith("cluster.")} | {"cluster": "inline"}
    return [f"{name}={value}" for name, value in given.items() if value is not None]


def rate(found: Sequence[Commit]) -> float:
    """Rows a second from the first commit to the last."""
    ordered = sorted(found, key=lambda c: c.at)
    return sum(c.rows for c in ordered[1:]) / (ordered[-1].at - ordered[0].at)


def largest(samples: Sequence[MemorySample], group: str, begin: float, end: float) -> float:
    """The most GiB that a group held in [begin, end]."""
    return max((s.rss.get(group, 0) for s in samples if begin <= s.at <= end), default=0) / GIB


def check(out: Path, rows: int, fraction: float) -> dict[str, int]:
    """Look through what the job made: every row is scored once and in the ledger once; returns counts.

    Raises:
        RuntimeError: a row is lost or doubled, or the curated shards are not what the ledger says.
    """
    scored = ds.dataset(out / "scores/parts").to_table(columns=["id"])
    ledger = ds.dataset(sorted(map(str, (out / "ledger").glob("*.parquet")))).to_table(columns=["id", "kept"])
    curated = ds.dataset(out / "curated").to_table(columns=["id"])
    kept = ledger.filter(ledger["kept"])["id"]
    found = {
        "scored": scored.num_rows,
        "scored_distinct": pc.count_distinct(scored["id"]).as_py(),
        "ledger": ledger.num_rows,
        "ledger_distinct": pc.count_distinct(ledger["id"]).as_py(),
        "kept": len(kept),
        "curated": curated.num_rows,
    }
    want = rows - int(rows * fraction + 0.5)
    wrong = {k: n for k, n in found.items() if n != (want if k in ("kept", "curated") else rows)}
    same = pa.array(sorted(kept.to_pylist())).equals(pa.array(sorted(curated["id"].to_pylist())))
    if wrong or not same:
        raise RuntimeError(f"of {rows} rows ({want} to keep): {found}; the kept ids agree: {same}")
    return found


def memory_lines(
    name: str, run: Watched, begin: float, end: float, settings: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Emit each group's memory over [begin, end]; returns what each had resident."""
    resident: dict[str, dict[str, float]] = {}
    for group in GROUPS:
        for kind in ("rss", "private"):
            points = [(s.at, float(getattr(s, kind).get(group, 0)) / GIB) for s in run.memory]
            found = series(points, begin, end)
            ratio = found["end"] / found["start"] if found["start"] else None
            emit(BENCH, f"{name}_{group}_{kind}", found, "GiB", ratio, "end / start" if ratio else None, settings)
            if kind == "rss":
                resident[group] = found
    return resident


def measure(args: argparse.Namespace, work: Path) -> list[tuple[str, str]]:
    """Run everything; emits the figures and returns the rows of the table."""
    settings: dict[str, Any] = {**vars(args), **machine()}
    corpus, out = work / "corpus", work / "out"
    parts = out / "scores/parts"
    shutil.rmtree(out, ignore_errors=True)
    (work / "scored").unlink(missing_ok=True)
    generating = generate(corpus, args.rows, args.shards, args.seed, args.processes)
    settings["corpus_bytes"] = folder_bytes(corpus)[1]
    emit(BENCH, "generate", generating, "s", settings=settings)
    options = job_options(work, corpus, args)
    print("curate run " + " ".join(options), file=sys.stderr)

    in_all = sum(-(-(args.rows * (i + 1) // args.shards - args.rows * i // args.shards) // args.unit_rows)
                 for i in range(args.shards))  # fmt: skip
    first = run_job("run", options, work, parts, max(2, in_all // 2), args.interval)
    before = commits(parts)
    second = run_job("run", options, work, parts, None, args.interval)
    after = commits(parts)
    assert first.killed is not None
    assert first.gone is not None
    gone = first.gone - first.killed
    new = [c for name, c in after.items() if name not in before or before[name].at != c.at]
    redone = scored_rows(work) - args.rows
    counts = check(out, args.rows, args.fraction)

    start, halfway = min(c.at for c in before.values()), max(c.at for c in before.values())
    again, last = min(c.at for c in new), max(c.at for c in new)
    scored, selected = second.when("score: done"), second.when("select: done")
    whole = first.killed - first.began + second.ended - second.began
    rates = {"before": rate(list(before.values())), "after": rate(new)}
    steady = args.rows / ((halfway - start) + (last - again))
    settings |= {"parts": len(after), "parts_at_kill": len(before), **counts}
    emit(BENCH, "rows_per_second", steady, "rows/s", settings=settings)
    emit(BENCH, "rows_per_second_by_half", rates, "rows/s", rates["after"] / rates["before"], "before", settings)
    emit(BENCH, "rows_per_second_with_everything", args.rows / whole, "rows/s", settings=settings)
    emit(BENCH, "seconds", {
        "to_first_commit": start - first.began,
        "first_half": first.killed - first.began,
        "until_no_process_is_left": gone,
        "resume_to_first_commit": again - second.began,
        "second_half_scored": scored - second.began,
        "selection": selected - scored,
        "report_and_end": second.ended - selected,
        "whole": whole,
    }, "s", settings=settings)  # fmt: skip
    emit(BENCH, "rows_scored_twice", redone, "rows", settings=settings)
    in_first = memory_lines("first_half", first, start, halfway, settings)
    in_second = memory_lines("second_half", second, again, scored, settings)
    selecting = {g: largest(second.memory, g, scored, selected) for g in GROUPS}
    ending = {g: largest(second.memory, g, selected, second.ended) for g in GROUPS}
    emit(BENCH, "selection_max_rss", selecting, "GiB", settings=settings)
    emit(BENCH, "report_max_rss", ending, "GiB", settings=settings)
    every = [*first.memory, *second.memory]
    top = max(s.rss.get("driver", 0) for s in every) / GIB
    spill = max((s.extra.get("spilled", 0) for s in every), default=0)
    emit(BENCH, "driver_rss_max", top, "GiB", top / 1.5, "1.5 GiB", settings)
    emit(BENCH, "object_store_spilled_max", spill / GIB, "GiB", settings=settings)
    size = {name: folder_bytes(out / name) for name in ("scores", "ledger", "curated")}
    size["manifest"] = (1, (out / "manifest.parquet").stat().st_size)
    size["report"] = (1, (out / "report.html").stat().st_size)
    size["corpus"] = (args.shards, settings["corpus_bytes"])
    for name, (files, total) in size.items():
        emit(BENCH, f"{name}_bytes_per_row", total / args.rows, "B/row", settings={**settings, "files": files})

    def flat(found: Mapping[str, float]) -> str:
        return " → ".join(f"{found[k]:.2f}" for k in ("start", "q1", "q2", "q3", "end")) + " GiB"

    names = ("corpus", "scores", "ledger", "curated", "manifest")
    return [
        ("rows, shards, parts", f"{args.rows:,}, {args.shards}, {len(after):,}"),
        ("rows/s while scoring (first half, second half)",
         f"{steady:,.0f} ({rates['before']:,.0f}, {rates['after']:,.0f})"),
        ("rows/s of all of it, restart, selection and report included", f"{args.rows / whole:,.0f}"),
        ("start of the job to its first commit", f"{start - first.began:.0f} s"),
        (f"SIGKILL of the driver at {len(before):,} parts: until no process is left", f"{gone:.1f} s"),
        ("… the same command again: until its first new commit", f"{again - second.began:.0f} s"),
        ("… rows scored twice; lost; doubled", f"{redone:,}; 0; 0"),
        ("selection: scores read, ranked, curated shards and ledgers written", f"{selected - scored:.0f} s"),
        ("report and end", f"{second.ended - selected:.0f} s"),
        ("driver's memory, first half (start → quartiles → end)", flat(in_first["driver"])),
        ("driver's memory, second half", flat(in_second["driver"])),
        ("scoring actors' memory, second half", flat(in_second["scorers"])),
        ("readers' memory, second half", flat(in_second["readers"])),
        ("driver's memory, most of all: selection; report", f"{selecting['driver']:.2f}; {ending['driver']:.2f} GiB"),
        ("object store spilled to disk, most", f"{spill / MIB:.0f} MiB"),
        ("bytes a row: " + ", ".join(names), ", ".join(f"{size[n][1] / args.rows:.1f}" for n in names)),
    ]  # fmt: skip


def markdown(rows: Sequence[tuple[str, str]]) -> str:
    return "| what | measured |\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in rows)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.million", description=__doc__)
    p.add_argument("--rows", type=int, default=1_000_000)
    p.add_argument("--shards", type=int, default=200, help="Parquet files")
    p.add_argument("--unit-rows", type=int, default=512, help="rows that are scored and committed at a time")
    p.add_argument("--fraction", type=float, default=0.1, help="share of the rows that is removed")
    p.add_argument("--layers", type=int, default=2, help="layers of the model; the last but one is tapped")
    p.add_argument("--width", type=int, default=32, help="width of the model")
    p.add_argument("--cpus", type=int, default=psutil.cpu_count(), help="CPUs that Ray is given")
    p.add_argument("--workers", type=int, default=None, help="scoring actors; default: the job's own")
    p.add_argument("--readers", type=int, default=None, help="reading tasks; default: the job's own")
    p.add_argument("--object-store-gb", type=float, default=None, help="default: Ray's own")
    p.add_argument("--inline", action="store_true", help="without Ray, in one process: to try the benchmark itself")
    p.add_argument("--processes", type=int, default=2, help="that generate the corpus")
    p.add_argument("--interval", type=float, default=1.0, help="seconds between samples of memory")
    p.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    p.add_argument("--keep", action="store_true", help="leave everything in --folder; else only the corpus stays there")
    p.add_argument("--table", type=Path, default=None, help="write the figures to this file as a Markdown table")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the job is not left behind
    with tempfile.TemporaryDirectory(prefix="curate-million-") as temp:
        work = (args.folder or Path(temp)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        args.folder, table = str(work), args.table
        args.table = None if table is None else str(table)
        rows = measure(args, work)
        if not args.keep:
            for name in ("out", "store", "site"):
                shutil.rmtree(work / name, ignore_errors=True)
    if table is not None:
        table.write_text(markdown(rows))
    print(markdown(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
