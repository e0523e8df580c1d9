"""Fixtures that several rooms use: one Ray for the whole run, tiny models on disk, a corpus as JSON Lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Tests neither find nor leave a Ray token of the user who runs them.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a 3-layer Llama with a ChatML tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=3)


@pytest.fixture(scope="session")
def running():
    """An embedded Ray with two CPUs, for all tests that need one."""
    from curate.runtime.cluster import ClusterSpec
    from curate.runtime.session import session

    with session(ClusterSpec(cpus=2, object_store_gb=0.3)) as found:
        yield found


@pytest.fixture
def here(monkeypatch) -> None:
    """Jobs of the test run inline. For what is the same on Ray, where each stage's actors cost seconds to start."""
    monkeypatch.setattr("tests.jobs.helpers.HERE", True)


def conversation(i: int, label: str = "plain") -> dict:
    """Row i of a made-up corpus; the length varies with i."""
    answer = " ".join(f"word{(i * 7 + k) % 23}" for k in range(3 + i % 11))
    turns = [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": answer}]
    return {"id": f"r{i}", "messages": turns, "label": label if i % 4 else "marked", "group": f"g{i % 3}", "n": i / 3}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder with two JSONL shards of 60 and 40 rows."""
    folder = tmp_path / "corpus"
    write_jsonl(folder / "a.jsonl", [conversation(i) for i in range(60)])
    write_jsonl(folder / "b.jsonl", [conversation(i) for i in range(60, 100)])
    return folder


@pytest.fixture(scope="session")
def model(tiny) -> Path:
    """The tiny model, with a concept file beside it."""
    import numpy as np

    from curate.concepts import concept as files
    from curate.concepts.concept import Concept
    from curate.models.load import ModelSpec, identity

    who = identity(ModelSpec(str(tiny)))
    vectors = np.random.default_rng(0).normal(size=(who["layers"] + 1, who["width"])).astype(np.float32)
    files.save(Concept("test", vectors, 2, who, "random", "response_mean"), str(tiny.parent / "concept"))
    return tiny
