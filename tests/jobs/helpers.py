"""Running jobs in tests: in this process (on the suite's Ray), or as a person would, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from curate.runtime.status import read_status
from jobs.app import compose_config, run

ROOT = Path(__file__).parents[2]
HERE = False  # True: run_job runs without Ray, which saves the seconds that every actor needs to import torch


def options(corpus: Path | str, model: Path, sink: Path | str, **more: object) -> list[str]:
    """Overrides for a tiny run: vector filter and response length with a concept file made by `tiny_concept`."""
    base: dict[str, object] = {
        "source": "files",
        "source.url": corpus,
        "source.unit_rows": 10,
        "source.columns.label": "label",
        "source.columns.group": "group",
        "source.positive_label": "marked",
        "model": "hf",
        "model.path": model,
        "concept": "[file]",
        "concept.file.path": Path(model).parent / "concept",
        "scorer": "[vector_filter,response_length]",
        "cluster.workers": 1,
        "sink.url": sink,
        "sink.store": Path(model).parent / "store",
        "report.bootstrap": 20,
        "report.examples": 3,
    }
    base.update(more)
    return [f"{k}={v}" for k, v in base.items() if v is not None]


def inline(overrides: list[str]) -> list[str]:
    """The same without Ray: pool sizes are left out, budgets and the peak stay."""
    kept = ("cluster.token_budget", "cluster.peak_tflops")
    pools = [o for o in overrides if o.startswith("cluster.") and not o.startswith(kept)]
    return [*(o for o in overrides if o not in pools), "cluster=inline", "cluster.cpus=1"]


def run_job(job: str, overrides: list[str]) -> None:
    """In this process; errors are raised as they are. Inline (see the fixture `here`) or on the suite's Ray."""
    import importlib

    if HERE:
        overrides = inline(overrides)
    run(compose_config(job, overrides), importlib.import_module(f"jobs.{job}").stages, job)


def command(job: str, overrides: list[str], **env: str) -> subprocess.Popen[str]:
    """`curate <job> …` as a process that has its own Ray."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", job, *overrides],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def complete(sink: Path | str) -> dict[str, tuple[int, int | None]]:
    """{stage: (done, total)} as `curate status` tells it of a sink that is complete."""
    found = read_status(str(sink), time.time())
    assert found.state == "complete", found
    return {s.stage: (s.done, s.total) for run in found.runs for s in run.stages}


def parts(sink: Path | str) -> dict[str, pa.Table]:
    """All score parts by name."""
    root = Path(sink) / "scores" / "parts"
    return {str(p.relative_to(root)): pq.read_table(p) for p in sorted(root.rglob("*.parquet"))}


def scores(sink: Path | str, column: str) -> dict[str, float]:
    """id -> score, over all parts; a doubled id fails."""
    out: dict[str, float] = {}
    for table in parts(sink).values():
        for name, value in zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True):
            assert name not in out, f"{name} was scored twice"
            out[name] = value
    return out


def ledger(sink: Path | str) -> list[dict]:
    root = Path(sink) / "ledger"
    return [r for p in sorted(root.rglob("*.parquet")) for r in pq.read_table(p).to_pylist()]


def curated(sink: Path | str) -> dict[str, list[dict]]:
    root = Path(sink) / "curated"
    return {p.name: [json.loads(x) for x in p.read_text().splitlines()] for p in sorted(root.glob("*.jsonl"))}
