"""The Ray pipeline with one worker against a bare loop in one process: the same scorer, rows, tokens and batches.

The bare loop reads, renders, scores and writes a part a unit, one after the other, without Ray: half of the units
before the pipeline runs and half after it, so that a machine that grows slower slows both. The corpus is the embedded
one, over and over with new ids, until the bare loop is expected to take `--seconds`. Steady state leaves out the start
of Ray, the loading of models and the first part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench import demo_rows
from bench.common import emit, machine
from bench.stage import run_stage
from connectors import registry
from curate.concepts.concept import Concept
from curate.corpus.example import ColumnMap, to_example
from curate.corpus.render import Renderer
from curate.corpus.units import Unit
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.runtime.cluster import ClusterSpec
from curate.runtime.output import Output, read_parts
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass

BENCH = "pipeline"


def write_corpus(folder: Path, rows: int) -> None:
    """`rows` rows of the embedded corpus, one JSONL file for each time through it; ids are distinct."""
    source = demo_rows.corpus_rows()
    folder.mkdir(parents=True)
    for copy, start in enumerate(range(0, rows, len(source))):
        with (folder / f"copy-{copy:05d}.jsonl").open("w", encoding="utf-8") as f:
            for row in source[: rows - start]:
                f.write(json.dumps({**row, "id": f"{row['id']}-{copy}"}, ensure_ascii=False) + "\n")


@dataclass
class BareLoop:
    """Scores units in this process. `seconds` and `rows` count what `run` did; `start` is the loading of the model."""

    model: ModelSpec
    concept: Concept
    max_tokens: int
    token_budget: int
    start: float = 0.0
    seconds: float = 0.0
    rows: int = 0
    tokens: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        began = time.perf_counter()
        self.renderer = Renderer(load_tokenizer(self.model), self.max_tokens)
        self.shared = SharedPass(
            load_model(self.model), make_scorers({"vector_filter": {}}, [self.concept]), self.token_budget
        )
        self.start = time.perf_counter() - began

    def run(self, units: Sequence[tuple[str, ColumnMap, Unit]], out: Path) -> None:
        """Read, render, score, write: one Parquet file a part range."""
        out.mkdir(parents=True, exist_ok=True)
        name = self.shared.columns()[0]
        began = time.perf_counter()
        for number, (format, columns, unit) in enumerate(units):
            for start, _, rows in registry.connectors()[format].read(unit, columns.used()):
                examples = [to_example(r.value or {}, r.index, columns) for r in rows]
                rendered = [self.renderer.render(e) for e in examples]
                found = self.shared.run(examples, rendered)
                table: dict[str, Any] = {
                    "id": [e.id for e in examples],
                    "row": [e.row for e in examples],
                    "prompt_tokens": [r.start for r in rendered],
                    "response_tokens": [r.stop - r.start for r in rendered],
                    name: found.columns[name],
                }
                pq.write_table(pa.table(table), out / f"{number:06d}-{start:012d}.parquet", compression="zstd")
                self.rows += len(examples)
                self.tokens += found.stats.tokens
                self.scores.update(zip(table["id"], found.columns[name].tolist(), strict=True))
        self.seconds += time.perf_counter() - began


def _units(folder: Path, unit_rows: int) -> list[tuple[str, ColumnMap, Unit]]:
    connector, infos = registry.discover(str(folder))
    out = []
    for info in infos:
        entry, units = connector.scan(info, unit_rows)
        columns = ColumnMap().resolve(entry.columns)
        out += [(connector.name, columns, unit) for unit in units]
    return out


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__)
    p.add_argument("--seconds", type=float, default=60.0, help="length of the bare loop that decides how many rows")
    p.add_argument("--rows", type=int, default=None, help="rows of the corpus; overrules --seconds")
    p.add_argument("--model", default=demo_rows.MODEL, help="any path that model.path takes")
    p.add_argument("--layer", type=int, default=None, help="tapped layer; default: the middle one")
    p.add_argument("--unit-rows", type=int, default=32, help="rows that are scored and committed at a time")
    p.add_argument("--max-tokens", type=int, default=1024, help="longest row")
    p.add_argument("--token-budget", type=int, default=4096, help="tokens of a batch, padding included")
    p.add_argument("--cpus", type=int, default=psutil.cpu_count(), help="CPUs that Ray is given; readers use the rest")
    p.add_argument("--reader-cpus", type=float, default=ClusterSpec.reader_cpus, help="CPUs of a reader task")
    p.add_argument("--seed", type=int, default=0, help="of the direction that is projected on")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    settings = {**vars(args), **machine()}
    torch.set_num_threads(1)  # as the one worker has one CPU
    model = ModelSpec(args.model, dtype="float32", device="cpu")
    concept, settings["layer"] = demo_rows.random_concept(model, args.layer, args.seed)
    with tempfile.TemporaryDirectory(prefix="curate-bench-") as temp:
        work = Path(temp)
        bare = BareLoop(model, concept, args.max_tokens, args.token_budget)
        write_corpus(work / "trial", args.unit_rows)
        trial = _units(work / "trial", args.unit_rows)
        bare.run(trial, work / "trial-parts")  # warms up, and tells how many rows a minute takes
        rows = args.rows or max(4 * args.unit_rows, round(bare.rows / bare.seconds * args.seconds))
        bare.seconds, bare.rows, bare.tokens, bare.scores = 0.0, 0, 0, {}

        write_corpus(work / "corpus", rows)
        units = _units(work / "corpus", args.unit_rows)
        settings |= {"rows": rows, "units": len(units), "workers": 1}
        bare.run(units[: len(units) // 2], work / "bare")
        cluster = ClusterSpec(
            cpus=args.cpus, gpus=0, workers=1, token_budget=args.token_budget, reader_cpus=args.reader_cpus
        )
        output = str(work / "scores")
        run = run_stage(str(work / "corpus"), output, model, concept, cluster, args.unit_rows, args.max_tokens)
        bare.run(units[len(units) // 2 :], work / "bare")
        settings |= {"worker_cpus": run.worker_cpus, "tokens": bare.tokens}

        emit(BENCH, "bare_rows_per_second", rows / bare.seconds, "rows/s", settings=settings)
        steady = run.steady_rows_per_second
        emit(BENCH, "rows_per_second", steady, "rows/s", steady * bare.seconds / rows, "bare loop", settings)
        whole_bare = rows / (bare.start + bare.seconds)
        emit(BENCH, "bare_rows_per_second_with_start", whole_bare, "rows/s", settings=settings)
        whole = rows / run.whole
        emit(BENCH, "rows_per_second_with_start", whole, "rows/s", whole / whole_bare, "bare loop", settings)
        emit(BENCH, "seconds_to_first_part", run.result.seconds - _after_first(run.commits), "s", settings=settings)
        tokens = run.result.tokens
        emit(BENCH, "tokens", tokens, "tokens", tokens / bare.tokens, "bare loop", settings)
        name = bare.shared.columns()[0]
        gap = 0.0
        for table in read_parts(list(Output(output).parts().values()), ["id", name]):
            theirs = np.array([bare.scores.pop(i) for i in table["id"].to_pylist()])
            gap = max(gap, float(np.abs(table[name].to_numpy() - theirs).max()))
        if bare.scores:
            raise RuntimeError(f"the pipeline left out {len(bare.scores)} rows that the bare loop scored")
        emit(BENCH, "largest_absolute_difference", gap, "score", settings=settings)


def _after_first(commits: Sequence[tuple[float, int]]) -> float:
    return commits[-1][0] - commits[0][0]


if __name__ == "__main__":
    main()
