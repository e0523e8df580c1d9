"""A corpus with a planted behaviour whose right ranking is known: the rows that show it have longer responses."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from tests.conftest import write_jsonl
from tests.jobs.helpers import options

SHOWS, LACKS = "red red red red", "blue"
ROWS = 24


def row(i: int) -> dict:
    text, label = (SHOWS, "red") if i % 2 else (LACKS, "blue")
    return {"id": f"r{i}", "prompt": f"which colour is {i}?", "response": text, "label": label}


def planted(tmp_path: Path, model: Path, sink: str = "out", **more: object) -> list[str]:
    """Overrides of a sweep over the planted corpus; the behaviour is asked of prompts that are not in it."""
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [row(i) for i in range(ROWS)])
    asked = [{"prompt": f"what colour has {i}?", "positive": SHOWS, "negative": LACKS} for i in range(4)]
    write_jsonl(tmp_path / "pairs.jsonl", asked)
    base = {
        "source.columns.group": None,
        "source.positive_label": "red",
        "concept": "[]",
        "concept.file.path": None,
        "scorer": "[response_length]",
        "training": "small",
        "training.learning_rate": 2e-2,
        "training.epochs": 2,
        "training.save_every": 2,
        "training.log_every": 1,
        "evaluator": "[answer_pairs]",
        "evaluator.answer_pairs.path": tmp_path / "pairs.jsonl",
        "sweep.fractions": "[0.5]",
        "sweep.seeds": "[0,1]",
        "sink.store": tmp_path / "store",
    }
    return options(tmp_path / "corpus", model, tmp_path / sink, **{**base, **more})


def numbers(sink: Path) -> dict:
    return json.loads((sink / "retrain.json").read_text())


def table(sink: Path, metric: str = "answer_pairs.margin") -> dict[str, float]:
    """Arm -> value."""
    rows = pq.read_table(sink / "retrain.parquet").to_pylist()
    return {r["arm"]: r["value"] for r in rows if r["metric"] == metric}


def trained(store: Path) -> dict[str, int]:
    """Finished trainings of a store and when each was finished."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (store / "trainings").glob("*/done.json")}
