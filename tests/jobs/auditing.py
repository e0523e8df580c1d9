"""A corpus that grows by a file a day, and audits of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from jobs.app import compose_config, run
from jobs.audit import stages
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import inline, options


def arrival(i: int, drifted: bool = False) -> dict:
    """Row i; a drifted one answers at length, in words that no other row has."""
    row = conversation(i)
    if drifted:
        text = " ".join(f"absolutely{(i + k) % 5}!" for k in range(20 + i % 9))
        row["messages"][1]["content"] = text
    return row


def day(folder: Path, date: str, rows: range, drifted: bool = False) -> Path:
    return write_jsonl(folder / f"chats-{date}.jsonl", [arrival(i, drifted) for i in rows])


def audit_options(corpus: Path, model: Path, sink: Path, **more: object) -> list[str]:
    own = {"audit.by": "none", "audit.languages": 0, "source.max_tokens": 512, **more}
    return options(corpus, model, sink, **own)


CHEAP = {"scorer": "[response_length]", "concept": "[]", "concept.file.path": None, "audit.worst_rows": 2}
"""For what is not about scores: one that needs no forward pass."""


@functools.cache
def _composed(model: Path) -> DictConfig:
    """The settings, but for the places. Composed once: that takes longer than a small audit."""
    given = audit_options(Path("arrivals"), model, Path("out"), **CHEAP)
    return compose_config("audit", inline(given))


def audit(corpus: Path | str, model: Path, sink: Path | str, capsys: Any = None, **more: object) -> dict:
    """Run one; the last line of standard output."""
    config = _composed(model).copy()
    values = {"source.url": str(corpus), "sink.url": str(sink), "sink.store": f"{sink}/store"}
    for name, value in {**values, **more}.items():
        OmegaConf.update(config, name, value)
    run(config, stages, "audit")
    return last_line(capsys) if capsys is not None else {}


def last_line(capsys: Any) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def scored(sink: Path, name: str) -> dict[str, dict[str, float]]:
    """{id: {column: score}} of one audit; a doubled id fails."""
    out: dict[str, dict[str, float]] = {}
    for p in sorted((sink / "audits" / name / "scores" / "parts").rglob("*.parquet")):
        for r in pq.read_table(p).to_pylist():
            assert r["id"] not in out, f"{r['id']} was scored twice"
            out[r["id"]] = {k: v for k, v in r.items() if isinstance(v, float)}
    return out


def column(sink: Path, name: str, which: str) -> np.ndarray:
    return np.array([v[which] for v in scored(sink, name).values()])


def history(sink: Path) -> list[dict]:
    return pq.read_table(sink / "audits" / "history.parquet").to_pylist()


def summary(sink: Path, name: str) -> dict:
    return json.loads((sink / "audits" / name / "summary.json").read_text())
