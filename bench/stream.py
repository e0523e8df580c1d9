"""Many rows of generated Parquet through a tiny model by the whole score stage: rows/s, and memory over time.

The model costs next to nothing, so what is measured is everything else. Memory is sampled for the driver (this
process), the scoring actors, the other Ray workers (readers) and Ray's own daemons, from the first committed part to
the last: a series at the start, the quartiles of time, the end, and the largest. Flat means that end / start is near 1.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench import demo_rows, tiny_model
from bench.common import GIB, MemorySampler, emit, machine, series
from bench.stage import run_stage
from curate.models.load import ModelSpec
from curate.runtime.cluster import ClusterSpec

BENCH = "stream"


def vocabulary() -> list[str]:
    """The words of the embedded corpus, in order of appearance."""
    texts = (m["content"] for row in demo_rows.corpus_rows() for m in row["messages"])
    return list(dict.fromkeys(word for text in texts for word in text.split()))


def write_shards(folder: Path, rows: int, shards: int, seed: int) -> int:
    """`rows` conversations of random words in `shards` Parquet files; returns the bytes written.

    A prompt has 4 to 12 words, a response 4 to 48: short rows, so that the model costs little.
    """
    words = vocabulary()
    folder.mkdir(parents=True)
    return sum(write_shard(folder, rows, shards, seed, shard, words) for shard in range(shards))


def write_shard(folder: Path, rows: int, shards: int, seed: int, shard: int, words: Sequence[str]) -> int:
    """Shard number `shard` of those; returns its bytes."""
    draw = random.Random(f"{seed}-{shard}")
    first, last = rows * shard // shards, rows * (shard + 1) // shards
    table = {
        "id": [f"row-{i:09d}" for i in range(first, last)],
        "messages": [
            [
                {"role": "user", "content": " ".join(draw.choices(words, k=draw.randint(4, 12)))},
                {"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(4, 48)))},
            ]
            for _ in range(first, last)
        ],
    }
    path = folder / f"shard-{shard:05d}.parquet"
    pq.write_table(pa.table(table), path, row_group_size=1024, compression="zstd")
    return path.stat().st_size


def ray_group(process: psutil.Process) -> str:
    """scorers, readers (idle workers too, as they read next) or daemons: Ray writes a worker's work in its title."""
    title = " ".join(process.cmdline()[:1])
    if title.startswith("ray::MapWorker"):
        return "scorers"
    return "readers" if title.startswith(("ray::IDLE", "ray::Map", "ray::call")) else "daemons"


def spilled_bytes(pid: int | None = None) -> Callable[[], Mapping[str, int]]:
    """Bytes that lie spilled on disk by the Ray that is a child of this process (of `pid`); nothing while there is
    none."""
    root = psutil.Process(pid)
    place: list[Path] = []

    def look() -> Mapping[str, int]:
        if not place:
            for child in root.children():
                try:
                    place.extend(Path(a.split("=", 1)[1]) for a in child.cmdline() if a.startswith("--session_dir="))
                except psutil.Error:  # it has ended
                    continue
        total = 0
        for path in place[0].glob("ray_spilled_objects*/**/*") if place else ():
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:  # restored and removed meanwhile
                continue
        return {"spilled": total} if place else {}

    return look


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    p.add_argument("--rows", type=int, default=200_000)
    p.add_argument("--shards", type=int, default=48, help="Parquet files")
    p.add_argument("--layers", type=int, default=2, help="layers of the model; the last but one is tapped")
    p.add_argument("--width", type=int, default=32, help="width of the model")
    p.add_argument("--unit-rows", type=int, default=512, help="rows that are scored and committed at a time")
    p.add_argument("--workers", type=int, default=1, help="scoring actors; the other CPUs read")
    p.add_argument("--cpus", type=int, default=psutil.cpu_count(), help="CPUs that Ray is given")
    p.add_argument("--reader-cpus", type=float, default=ClusterSpec.reader_cpus, help="CPUs of a reader task")
    p.add_argument("--object-store-gb", type=float, default=None, help="default: Ray's own")
    p.add_argument("--interval", type=float, default=0.5, help="seconds between samples of memory")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    settings = {**vars(args), **machine()}
    with tempfile.TemporaryDirectory(prefix="curate-bench-") as temp:
        work = Path(temp)
        size = write_shards(work / "corpus", args.rows, args.shards, args.seed)
        model = ModelSpec(
            str(tiny_model.save(work / "model", vocabulary(), args.layers, args.width)), dtype="float32", device="cpu"
        )
        concept, layer = demo_rows.random_concept(model, max(1, args.layers - 1), args.seed)
        cluster = ClusterSpec(
            cpus=args.cpus,
            gpus=0,
            workers=args.workers,
            reader_cpus=args.reader_cpus,
            object_store_gb=args.object_store_gb,
        )
        with MemorySampler(ray_group, args.interval, spilled_bytes()) as memory:
            run = run_stage(str(work / "corpus"), str(work / "scores"), model, concept, cluster, args.unit_rows, 2048)
    settings |= {"layer": layer, "corpus_bytes": size, "parts": len(run.commits), "tokens": run.result.tokens}
    emit(BENCH, "rows_per_second", run.steady_rows_per_second, "rows/s", settings=settings)
    emit(BENCH, "rows_per_second_with_start", args.rows / run.whole, "rows/s", settings=settings)
    emit(BENCH, "tokens_per_second", run.result.tokens / run.result.seconds, "tokens/s", settings=settings)
    emit(BENCH, "manifest", run.manifest, "s", settings=settings)
    begin, end = run.commits[0][0], run.commits[-1][0]
    for group in ("driver", "scorers", "readers", "daemons"):
        for kind, at in (("rss", "rss"), ("private", "private")):
            points = [(s.at, float(getattr(s, at).get(group, 0)) / GIB) for s in memory.samples]
            found = series(points, begin, end)
            ratio = found["end"] / found["start"] if found["start"] else None
            emit(BENCH, f"{group}_{kind}", found, "GiB", ratio, "end / start" if ratio else None, settings)
    emit(BENCH, "peak_scorer_rss", run.result.peak_worker_gb, "GiB", settings=settings)
    spilled = [s.extra["spilled"] for s in memory.samples if "spilled" in s.extra]
    if spilled:
        emit(BENCH, "object_store_spilled_max", max(spilled) / GIB, "GiB", settings=settings)


if __name__ == "__main__":
    main()
