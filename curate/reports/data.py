"""What a report is made from: plain values and arrays, checked once.

In: what the jobs gathered (scores, decisions, example texts, timings). Out: a frozen ReportData.
Knows nothing of where the values came from, and nothing of HTML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curate.errors import ConfigError, near

COUNTS = ("rows", "scored", "kept", "dropped", "quarantined")


@dataclass(frozen=True)
class ExampleView:
    """One conversation as it is shown. `rank` counts from 0 (highest score); −1 means not ranked.

    `tokens`, where known: the scored response in pieces, each with what it adds to the score. They join to the text of
    the last message, and are shown in its place, coloured.
    """

    id: str
    row: int
    source: str
    label: str | None
    score: float
    rank: int
    kept: bool
    messages: tuple[tuple[str, str], ...]  # (role, text), the scored response last
    tokens: tuple[tuple[str, float], ...] | None = None


@dataclass(frozen=True)
class ExampleSets:
    """The conversations to show: both ends of the ranking, and those on either side of the cut, each in the order
    it is shown in (borderline by falling or rising score: the page draws the cut where `kept` changes)."""

    highest: tuple[ExampleView, ...] = ()
    lowest: tuple[ExampleView, ...] = ()
    borderline: tuple[ExampleView, ...] = ()


@dataclass(frozen=True)
class ConceptView:
    """A concept's layer profile: per layer the vector's norm and, where known, how well it separates held-out pairs.

    `layer` is the layer that was used (an index into Hugging Face's `hidden_states`), None when several were.
    """

    name: str
    layer: int | None
    profile: tuple[tuple[int, float, float | None], ...]  # (layer, norm, held-out AUC or None)


@dataclass(frozen=True)
class InfluenceView:
    """What the influence scores of `methods` rest on.

    curvature: "ekfac", "kfac", "diagonal" or "identity" (gradients as they are; then there was no fit: `fisher`,
    `damping`, `rows` and `tokens` are None). damping: in words. tracked, total: parameters of the model; left_out:
    {what: parameters}. warnings: what influence does not see. behaviours: (name, share of the test vector's ‖s‖² that
    its low-rank form keeps, None where it is whole). queries: how many stand for the behaviour.
    backend: how the derivatives were taken.
    """

    methods: tuple[str, ...]
    curvature: str
    behaviours: tuple[tuple[str, float | None], ...]
    queries: int | None = None
    backend: str | None = None
    fisher: str | None = None
    damping: str | None = None
    rows: int | None = None
    tokens: int | None = None
    tracked: int | None = None
    total: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    scores: column name -> float [n]; NaN where a row has no such score. Higher = more of the trait.
    labels: str [n], "" or None where a row has none. positive_label: the label of rows that show the trait.
    keep: bool [n], the decision about each row. rule: the decision in words.
    cut: the score at the border; a mapping {group: score} when every group has its own; None when there is none.
    counts: at least rows, scored, kept, dropped, quarantined. They may exceed n: quarantined rows have no score.
    quarantine: (reason, number of rows, [(source, row, excerpt)]).
    dropped_by_label: dropped rows of each label, used where `labels` is None; else it is counted from `labels`.
    timings: (stage, seconds, rows, tokens), rows and tokens None where they mean nothing.
    token_meaning: what the value of an example's token says, as a clause; of the examples that have tokens.

    Raises:
        ConfigError: a column without scores, arrays of different lengths, or a count that is missing.
    """

    title: str
    recipe: Mapping[str, Any]
    columns: tuple[str, ...]
    primary: str
    scores: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    positive_label: str | None
    keep: np.ndarray
    rule: str
    cut: float | Mapping[str, float] | None
    counts: Mapping[str, int]
    created: str
    examples: ExampleSets = field(default_factory=ExampleSets)
    concepts: tuple[ConceptView, ...] = ()
    quarantine: tuple[tuple[str, int, tuple[tuple[str, int, str], ...]], ...] = ()
    dropped_by_label: Mapping[str, int] = field(default_factory=dict)
    timings: tuple[tuple[str, float, int | None, int | None], ...] = ()
    warnings: tuple[str, ...] = ()
    influence: tuple[InfluenceView, ...] = ()
    token_meaning: str = "what the token adds to the score"

    def __post_init__(self) -> None:
        missing = [c for c in self.columns if c not in self.scores]
        if missing:
            raise ConfigError(f"the report has no scores for column {missing[0]!r}{near(missing[0], self.scores)}")
        if self.primary not in self.columns:
            raise ConfigError(
                f"the report's primary column {self.primary!r} is not one of its columns"
                f"{near(self.primary, self.columns)}"
            )
        n = len(self.keep)
        lengths = {c: len(self.scores[c]) for c in self.columns}
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
        for name, length in lengths.items():
            if length != n:
                raise ConfigError(f"the report has {n} decisions but {length} values of {name!r}; they must agree")
        absent = [c for c in COUNTS if c not in self.counts]
        if absent:
            raise ConfigError(f"the report's counts lack {', '.join(map(repr, absent))}; give {', '.join(COUNTS)}")
