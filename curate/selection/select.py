"""Select rows by their score: remove or keep the most or the least, by fraction, count or threshold.

In: one score a row (higher = more of the trait, NaN = not scored) and a Rule. Out: a Decision, one entry a row.
Does not know what the score means, nor any text, file or format. A million rows take well under a second, and the
extra memory is a few arrays of the length of the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from curate.errors import ConfigError, near

Mode = Literal["remove_most", "remove_least", "keep_most", "keep_least"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Rule:
    """What to do with a ranking. Exactly one of `fraction`, `count` and `threshold` is set.

    The *chosen* rows are those that `remove_…` removes and `keep_…` keeps:
    - `fraction` in (0, 1): that share of the scored rows, rounded half up, and at least one row.
    - `count`: that many of the scored rows.
    - `threshold`: `…_most` chooses scores ≥ threshold, `…_least` scores ≤ threshold.

    With `per_group` the rule is applied in each group by itself. There a fraction is rounded half up without the
    minimum of one row, but never so that a whole group would be lost (a group of one row stays); a count larger than
    a group chooses the whole group.

    Raises:
        ConfigError: unknown mode; not exactly one amount; a fraction outside (0, 1), a count below 1, NaN threshold.
    """

    mode: Mode
    fraction: float | None = None
    count: int | None = None
    threshold: float | None = None
    per_group: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"selector.mode is {self.mode!r}, which is unknown{near(self.mode, MODES)}")
        amounts = {"fraction": self.fraction, "count": self.count, "threshold": self.threshold}
        given = [name for name, value in amounts.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ConfigError(
                f"set exactly one of selector.fraction, selector.count, selector.threshold; found {found}"
            )
        for name, value in amounts.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"selector.{name} is {value!r}; it must be a number")
        if self.fraction is not None and not 0.0 < self.fraction < 1.0:
            raise ConfigError(f"selector.fraction is {self.fraction}; it must lie between 0 and 1, both excluded")
        if self.count is not None and (self.count < 1 or self.count != int(self.count)):
            raise ConfigError(f"selector.count is {self.count}; it must be a whole number of at least 1")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ConfigError("selector.threshold is NaN; give a number")

    @property
    def removes(self) -> bool:
        """True if the chosen rows are dropped, False if they are the ones that stay."""
        return self.mode.startswith("remove")

    @property
    def most(self) -> bool:
        """True if the chosen rows have the highest scores, False if the lowest."""
        return self.mode.endswith("most")

    def text(self) -> str:
        """The rule as one line, for ledgers and reports: ``"remove_most fraction=0.25 per group"``."""
        name, value = next(
            (n, v)
            for n, v in (("fraction", self.fraction), ("count", self.count), ("threshold", self.threshold))
            if v is not None
        )
        return f"{self.mode} {name}={value:g}" + (" per group" if self.per_group else "")


@dataclass(frozen=True)
class Decision:
    """What was decided, row by row, in the order of the scores.

    keep: False for dropped rows and for rows without a score.
    rank: 0 = highest score, ties by row order, -1 = no score; counted within the group when the rule is per group.
    quantile: share of the scored rows (of the group) that rank at or below this one: 1 = highest, NaN = no score.
    cut: the chosen row's score nearest to the others, so that using `cut` as a threshold chooses the same rows but for
        ties. One number, or one a group, with no entry for a group in which nothing was chosen.
    """

    keep: NDArray[np.bool_]
    rank: NDArray[np.int64]
    quantile: NDArray[np.float64]
    cut: float | dict[str, float]
    n_rows: int
    n_scored: int
    n_kept: int

    @property
    def n_dropped(self) -> int:
        """Scored rows that the rule dropped."""
        return self.n_scored - self.n_kept

    @property
    def n_unscored(self) -> int:
        """Rows without a score: neither ranked nor kept."""
        return self.n_rows - self.n_scored


def decide(scores: ArrayLike, rule: Rule, groups: Any = None) -> Decision:
    """Apply `rule` to `scores`.

    Args:
        scores: [n], higher = more of the trait; NaN = not scored.
        groups: [n] group names (strings; None is a group of its own, named ""); needed when `rule.per_group`.

    Raises:
        ConfigError: no row is scored, a count larger than the number of scored rows (of the largest group), no groups
            where the rule needs them, or no row would be left.
    """
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ConfigError(f"scores have the shape {values.shape}; expected one number a row")
    scored = np.flatnonzero(~np.isnan(values))
    if scored.size == 0:
        raise ConfigError(f"none of the {values.size} rows has a score, so nothing can be selected")
    codes, names = _group_codes(groups, values.size, rule)

    # Stable sort of the negated scores: highest first, ties keep the order of the rows. Then stable by group.
    order = scored[np.argsort(-values[scored], kind="stable")]
    if names is not None:
        order = order[np.argsort(codes[order], kind="stable")]
    of_sorted = codes[order]
    sizes = np.bincount(of_sorted, minlength=1 if names is None else len(names))
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    local = np.arange(order.size) - starts[of_sorted]  # rank within the group
    sorted_scores = values[order]

    amounts = _amounts(rule, sizes, of_sorted, sorted_scores)
    bound = amounts[of_sorted]
    chosen = local < bound if rule.most else local >= sizes[of_sorted] - bound
    keep = np.zeros(values.size, dtype=bool)
    keep[order] = ~chosen if rule.removes else chosen
    n_kept = int(keep.sum())
    if n_kept == 0:
        raise ConfigError(
            f"the rule {rule.text()!r} leaves none of the {scored.size} scored rows "
            f"(scores from {sorted_scores.min():.6g} to {sorted_scores.max():.6g}); choose a smaller amount to remove "
            f"or another threshold"
        )
    rank = np.full(values.size, -1, dtype=np.int64)
    rank[order] = local
    quantile = np.full(values.size, np.nan)
    quantile[order] = 1.0 - local / sizes[of_sorted]
    return Decision(
        keep=keep,
        rank=rank,
        quantile=quantile,
        cut=_cuts(rule, names, sizes, starts, amounts, sorted_scores),
        n_rows=values.size,
        n_scored=int(scored.size),
        n_kept=n_kept,
    )


def _group_codes(groups: Any, n: int, rule: Rule) -> tuple[NDArray[np.int64], list[str] | None]:
    """A small integer a row and the groups' names, in order of first appearance; all zero without groups."""
    if not rule.per_group:
        return np.zeros(n, dtype=np.int64), None
    column = groups if groups is None or isinstance(groups, pa.Array) else pa.array(groups, from_pandas=True)
    if column is None or column.null_count == len(column):
        raise ConfigError("selector.per_group is on, but no row has a group; name the column: source.columns.group=…")
    if len(column) != n:
        raise ConfigError(f"there are {len(column)} groups for {n} scores; one of each is needed a row")
    encoded = column.cast(pa.string()).fill_null("").dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _amounts(
    rule: Rule, sizes: NDArray[np.int64], of_sorted: NDArray[np.int64], sorted_scores: NDArray[np.float64]
) -> NDArray[np.int64]:
    """How many rows are chosen in each group [groups]."""
    if rule.threshold is not None:
        beyond = sorted_scores >= rule.threshold if rule.most else sorted_scores <= rule.threshold
        return np.bincount(of_sorted[beyond], minlength=sizes.size).astype(np.int64)
    if rule.count is not None:
        if rule.count > sizes.max():
            where = "the largest group has" if rule.per_group else "there are"
            raise ConfigError(f"selector.count is {rule.count}, but {where} only {sizes.max()} scored rows")
        return np.minimum(int(rule.count), sizes)
    assert rule.fraction is not None
    # The tiny term keeps 0.29 * 50 = 14.499999999999998 on the side where the decimal number lies.
    rounded = np.floor(rule.fraction * sizes + 0.5 + 1e-9).astype(np.int64)
    if not rule.per_group:
        return np.clip(rounded, 1, sizes)
    low = np.zeros_like(sizes) if rule.removes else np.minimum(1, sizes)
    high = np.maximum(sizes - 1, 0) if rule.removes else sizes
    return np.clip(rounded, low, high)


def _cuts(
    rule: Rule,
    names: list[str] | None,
    sizes: NDArray[np.int64],
    starts: NDArray[np.int64],
    amounts: NDArray[np.int64],
    sorted_scores: NDArray[np.float64],
) -> float | dict[str, float]:
    if rule.threshold is not None and names is None:
        return float(rule.threshold)
    at = starts + (amounts - 1 if rule.most else sizes - amounts)
    if names is None:
        return float(sorted_scores[at[0]])
    if rule.threshold is not None:
        return {name: float(rule.threshold) for name in names}
    return {name: float(sorted_scores[at[i]]) for i, name in enumerate(names) if amounts[i] > 0}
