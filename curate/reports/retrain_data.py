"""What the page of a retraining sweep is made from: plain values, checked once, and the same as JSON and as a table.

In: what the sweep gathered: its arms, what was measured on each, how the scores agree. Out: a frozen RetrainData.
Knows nothing of how arms are trained or measured, and nothing of HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError

from curate.errors import ConfigError, near
from curate.evaluation.base import Measure, Metric
from curate.evaluation.ranking import Ranking, TopRow
from curate.selection.select import MODES

CONTROLS = ("random", "full", "base")


@dataclass(frozen=True)
class ArmView:
    """One arm of the sweep: a model, trained on some of the rows, and what was measured on it.

    name: unique, for tables. kind: "method" (ranked by `column`), "random" (ranked by chance; `column` may name the
    draw), "full" (all rows), "base" (not trained). mode, fraction: of the selection, as in a Rule; a random arm may
    have no mode: then `fraction` is the share of rows removed. seed: of the training; None for base.
    rows: rows trained on. training: which training gave the model; arms of one training share it. None for base.
    measures: by metric key; a metric that is not there was not measured. losses: (step, training loss).
    failed: why there is no model or no measure, in one line; such an arm is told of and drawn nowhere.
    """

    name: str
    kind: Literal["method", "random", "full", "base"]
    column: str | None = None
    mode: str | None = None
    fraction: float | None = None
    seed: int | None = None
    rows: int | None = None
    training: str | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    seconds: float | None = None
    failed: str | None = None

    @property
    def removed(self) -> float | None:
        """Share of the rows that the arm went without: 0 for the full set, None for the base model."""
        if self.kind in ("full", "base") or self.fraction is None:
            return 0.0 if self.kind == "full" else None
        return 1 - self.fraction if self.mode is not None and self.mode.startswith("keep") else self.fraction


@dataclass(frozen=True)
class RetrainData:
    """Everything on the page.

    rows: rows of the full set. columns: score columns that ranked, in order. metrics: by key "evaluator.metric".
    trait: key of the metric that the sweep is about (its sense is "trait", or "loss" of responses that show the
    trait, where less means more: then say so in `notes`). capability: key of the metric of the Pareto, None: without.
    spearman: rank correlation of every two columns, as evaluation.ranking.spearman gives it; None or NaN where
    unknown; over `scored` rows. rankings, top: by column, how it ranks labelled rows (positive_label), where known.
    settings: what was trained and how, (name, value) in the reader's words. notes: what a reader must know, each a
    sentence or two. recipe: as JSON values.

    Raises:
        ConfigError: two arms of one name, a method arm without a column of `columns`, mode or fraction, a measure or
            key that `metrics` lacks, a matrix of another shape.
    """

    title: str
    created: str
    rows: int
    columns: tuple[str, ...]
    metrics: Mapping[str, Metric]
    trait: str
    arms: tuple[ArmView, ...]
    capability: str | None = None
    spearman: tuple[tuple[float | None, ...], ...] = ()
    scored: int | None = None
    rankings: Mapping[str, Ranking] = field(default_factory=dict)
    top: Mapping[str, tuple[TopRow, ...]] = field(default_factory=dict)
    positive_label: str | None = None
    settings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, key in (("trait", self.trait), ("capability", self.capability)):
            if key is not None and key not in self.metrics:
                raise ConfigError(
                    f"the sweep's {what} metric {key!r} is not one of its metrics{near(key, self.metrics)}"
                )
        names: set[str] = set()
        for arm in self.arms:
            if arm.name in names:
                raise ConfigError(f"two arms of the sweep are named {arm.name!r}; a name stands for one arm")
            names.add(arm.name)
            self._check(arm)
        c = len(self.columns)
        if self.spearman and (len(self.spearman) != c or any(len(row) != c for row in self.spearman)):
            raise ConfigError(
                f"the matrix of rank correlations is {len(self.spearman)} × {len(self.spearman[0])}, but there are "
                f"{c} score columns; give one row and one column for each, in their order"
            )
        for of, found in (("ranking", self.rankings), ("top rows", self.top)):
            for name in found:
                if name not in self.columns:
                    raise ConfigError(
                        f"there is a {of} of the column {name!r}, which is unknown{near(name, self.columns)}"
                    )

    def _check(self, arm: ArmView) -> None:
        for key in arm.measures:
            if key not in self.metrics:
                raise ConfigError(f"arm {arm.name!r} has a measure {key!r}, which is unknown{near(key, self.metrics)}")
        if arm.mode is not None and arm.mode not in MODES:
            raise ConfigError(f"arm {arm.name!r} has the mode {arm.mode!r}, which is unknown{near(arm.mode, MODES)}")
        if arm.kind == "method":
            if arm.column not in self.columns:
                raise ConfigError(
                    f"arm {arm.name!r} is ranked by {arm.column!r}, which is not one of the sweep's columns"
                    f"{near(str(arm.column), self.columns)}"
                )
            if arm.mode is None:
                raise ConfigError(f"arm {arm.name!r} has no mode; choose from {', '.join(MODES)}")
        if arm.kind in ("method", "random") and (arm.fraction is None or not 0 < arm.fraction < 1):
            raise ConfigError(f"arm {arm.name!r} has the fraction {arm.fraction}; it must lie between 0 and 1")

    def value(self, arm: ArmView, key: str) -> float | None:
        """What was measured, or None: nothing was, the arm failed, or the value is not finite."""
        measure = arm.measures.get(key)
        if arm.failed is not None or measure is None or measure.value is None or not math.isfinite(measure.value):
            return None
        return measure.value


def matrix(correlations: Float[np.ndarray, "c c"]) -> tuple[tuple[float | None, ...], ...]:
    """Rank correlations as RetrainData takes them: NaN as None."""
    return tuple(tuple(float(v) if np.isfinite(v) else None for v in row) for row in correlations)


def dumps(data: RetrainData) -> str:
    """As JSON text (retrain.json); `loads` gives an equal RetrainData back."""
    return TypeAdapter(RetrainData).dump_json(data, indent=1).decode()


def loads(text: str, where: str = "the text") -> RetrainData:
    """What `dumps` wrote.

    Raises:
        ConfigError: it is not the JSON of a sweep's report; the message names `where` and the first thing amiss.
    """
    try:
        return TypeAdapter(RetrainData).validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "the top"
        raise ConfigError(
            f"{where} is not the report of a sweep: at {place}: {first['msg']}; `curate retrain` writes a new one"
        ) from None


def table(data: RetrainData) -> list[dict[str, Any]]:
    """One dict for every arm and metric (retrain.parquet); an arm on which nothing was measured has one without."""
    out = []
    for arm in data.arms:
        head = {
            "arm": arm.name,
            "kind": arm.kind,
            "column": arm.column,
            "mode": arm.mode,
            "fraction": arm.fraction,
            "removed": arm.removed,
            "seed": arm.seed,
            "rows": arm.rows,
            "training": arm.training,
            "seconds": arm.seconds,
            "failed": arm.failed,
        }
        none: dict[str, Any] = {"metric": None, "value": None, "low": None, "high": None, "n": None, "missing": None}
        found: list[dict[str, Any]] = [
            {"metric": key, "value": m.value, "low": m.low, "high": m.high, "n": m.n, "missing": m.missing}
            for key, m in arm.measures.items()
        ]
        out += [{**head, **measured} for measured in found or [none]]
    return out
