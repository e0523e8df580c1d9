"""Rules of an audit: which drift is worth a word, and which is worth waking somebody.

In: rules, and what an audit has measured. Out: findings. Knows no files and computes no statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from curate.errors import ConfigError

if TYPE_CHECKING:
    from curate.evaluation.drift import Drift

TOTAL = ""
"""The name of the slice of all new rows."""
Measure = Literal[
    "psi", "ks", "ks_p", "share_above", "mean", "mean_shift",
    "rows", "quarantined", "left_out", "new_labels", "new_languages",
]  # fmt: skip
OF_SCORES = ("psi", "ks", "ks_p", "share_above", "mean", "mean_shift")
_OF_TOTAL = ("left_out", "new_labels", "new_languages")
_SIGNS = {"above": ">", "below": "<"}


@dataclass(frozen=True)
class Rule:
    """It fires where `measure` lies `op` (above, below) `limit` and enough rows were measured.

    column: of the measures of scores alone; a name or a pattern with *, None: every column. slices: `total`, all new
    rows together; `each`, also every source by itself. min_rows: new rows (of a score: rows of the baseline too) below
    which nothing is concluded. `quarantined` is a share of the rows; `left_out` counts broken files, `new_labels` and
    `new_languages` count names.

    Raises:
        ConfigError: on construction, for a setting that means nothing.
    """

    measure: Measure
    limit: float
    op: Literal["above", "below"] = "above"
    column: str | None = None
    slices: Literal["total", "each"] = "total"
    min_rows: int = 0
    severity: Literal["warn", "fail"] = "fail"

    def __post_init__(self) -> None:
        if self.column is not None and self.measure not in OF_SCORES:
            raise ConfigError(f"a rule on {self.measure} has no column; it says column={self.column!r}")
        if self.slices == "each" and self.measure in _OF_TOTAL:
            raise ConfigError(f"{self.measure} is measured on all new rows together; leave out slices=each")
        if self.min_rows < 0:
            raise ConfigError(f"a rule on {self.measure} has min_rows={self.min_rows}; it must be at least 0")

    @property
    def text(self) -> str:
        """As one reads it: ``psi > 0.25``."""
        return f"{self.measure} {_SIGNS[self.op]} {self.limit:g}"

    @property
    def told(self) -> str:
        """The whole rule in words."""
        column = f" of {self.column}" if self.column else ""
        where = ", of every source too" if self.slices == "each" else ""
        rows = f", from {self.min_rows:,} rows on" if self.min_rows else ""
        return f"{self.measure}{column} {_SIGNS[self.op]} {self.limit:g}{where}{rows}"


@dataclass(frozen=True)
class Slice:
    """All new rows (`source` = TOTAL) or those of one source: rows, quarantined ones of them, drift by column."""

    source: str
    rows: int
    quarantined: int
    drift: Mapping[str, Drift]


@dataclass(frozen=True)
class Finding:
    """A rule that fired: where, on what, and by how much."""

    rule: str
    severity: Literal["warn", "fail"]
    measure: str
    source: str
    column: str | None
    value: float
    limit: float
    op: Literal["above", "below"]
    rows: int
    baseline_rows: int | None = None

    @property
    def text(self) -> str:
        """One line for a log or a page."""
        where = f" in {self.source!r}" if self.source != TOTAL else ""
        what = f" of {self.column}" if self.column else ""
        of = f"{self.rows:,} rows" + (f" against {self.baseline_rows:,}" if self.baseline_rows is not None else "")
        return f"{self.measure}{what}{where} is {self.value:.4g} ({_SIGNS[self.op]} {self.limit:g}; {of})"


def findings(rules: Sequence[Rule], slices: Sequence[Slice], names: Mapping[str, int]) -> list[Finding]:
    """What fires, in the order of the rules. `names`: how many left_out, new_labels and new_languages there are.

    Of several rules that fire on the same thing in the same direction, the gravest one is told; of equals the first.
    A PSI that samples of these sizes show without any drift (`Drift.psi_noise`) fires nothing, whatever the limit.
    """
    out: dict[tuple[str, str, str, str | None], Finding] = {}
    for rule in rules:
        for part in slices:
            for f in _fired(rule, part, names) if part.source == TOTAL or rule.slices == "each" else ():
                what = f.measure, f.op, f.source, f.column
                if what not in out or (f.severity, out[what].severity) == ("fail", "warn"):
                    out[what] = f
    return list(out.values())


def undecided(rules: Sequence[Rule], total: Slice) -> list[str]:
    """Rules that did not fire on all new rows, and at their limit could not, as these are too few; a line each, with
    why, of the first such column."""
    out = []
    for rule in rules:
        if rule.measure in OF_SCORES:
            concerned = [(c, d) for c, d in total.drift.items() if _concerns(rule, c, d)]
            whys = [
                f"{rule.measure} of {column} {_SIGNS[rule.op]} {rule.limit:g}: {why}"
                for column, drift in concerned
                if not _of_score(rule, total, column, drift) and (why := _why_not(rule, drift)) is not None
            ]
        else:
            few = f"{rule.text}: {total.rows:,} rows, and the rule has min_rows={rule.min_rows:,}"
            whys = [few] if total.rows < rule.min_rows else []
        if whys:
            more = f" ({len(whys) - 1} more columns)" if len(whys) > 1 else ""
            out.append(whys[0] + more)
    return out


def _fired(rule: Rule, part: Slice, names: Mapping[str, int]) -> list[Finding]:
    if rule.measure in OF_SCORES:
        return [f for column, drift in part.drift.items() for f in _of_score(rule, part, column, drift)]
    if rule.measure in _OF_TOTAL:
        value = float(names.get(rule.measure, 0))
    elif rule.measure == "rows":
        value = float(part.rows)
    else:
        value = part.quarantined / part.rows if part.rows else 0.0
    if part.rows < rule.min_rows or not _beyond(rule, value):
        return []
    return [Finding(rule.text, rule.severity, rule.measure, part.source, None, value, rule.limit, rule.op, part.rows)]


def _of_score(rule: Rule, part: Slice, column: str, drift: Drift) -> list[Finding]:
    value = getattr(drift, rule.measure)
    if not _concerns(rule, column, drift) or not _beyond(rule, value) or _few(rule, drift):
        return []
    if _bound_by_noise(rule) and drift.psi_noise is not None and value <= drift.psi_noise:
        return []
    rows = drift.n, drift.baseline_n if _compares(rule) else None
    where = rule.measure, part.source, column
    return [Finding(rule.text, rule.severity, *where, value, rule.limit, rule.op, *rows)]


def _concerns(rule: Rule, column: str, drift: Drift) -> bool:
    named = rule.column is None or fnmatchcase(column, rule.column)
    return named and getattr(drift, rule.measure) is not None


def _compares(rule: Rule) -> bool:
    return rule.measure not in ("mean", "share_above")


def _bound_by_noise(rule: Rule) -> bool:
    return rule.measure == "psi" and rule.op == "above"


def _few(rule: Rule, drift: Drift) -> bool:
    return (min(drift.n, drift.baseline_n) if _compares(rule) else drift.n) < rule.min_rows


def _why_not(rule: Rule, drift: Drift) -> str | None:
    """Why what is just beyond the rule's limit would not fire on samples of these sizes; None: it would."""
    rows = f"{drift.n:,} rows" + (f" against {drift.baseline_n:,}" if _compares(rule) else "")
    if _few(rule, drift):
        return f"{rows}, and the rule has min_rows={rule.min_rows:,}"
    if _bound_by_noise(rule) and drift.psi_noise is not None and drift.psi_noise > rule.limit:
        return f"{rows} show up to {drift.psi_noise:.3g} by chance alone"
    return None


def _beyond(rule: Rule, value: float) -> bool:
    return value > rule.limit if rule.op == "above" else value < rule.limit


def worst_severity(found: Sequence[Finding]) -> Literal["fine", "warn", "fail"]:
    """The gravest severity among the findings."""
    if any(f.severity == "fail" for f in found):
        return "fail"
    return "warn" if found else "fine"
