"""Groups of rows by the latents that fire on them: influence, mix of labels, whole groups removed (METHODS §6).

In: sparse activations of rows in blocks, a score a row, labels. Out: a tally of every group, an order to take groups
in, which rows go when whole groups are taken until a share is gone, curves of what the groups taken so far cover.
A group is a latent; its members are the rows on which its activation is above a threshold, and a row is in many groups
(paper A §4.1.3). Does not know what the score means, nor any model, text or file. Nothing of the size [rows, groups]
is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from curate.concepts.latent_rows import Blocks, above
from curate.errors import ConfigError, near
from curate.selection.select import Decision

Aggregate = Literal["mean", "sum"]
GroupMode = Literal["remove_most", "remove_least"]


@dataclass(frozen=True)
class GroupRule:
    """How groups are made and taken.

    threshold: members are the rows whose activation is above it. aggregate: group influence is the mean or the sum of
    its members' scores. mode: groups of the highest or the lowest influence first. fraction in (0, 1): whole groups
    are taken until at least this share of the scored rows is gone. min_members: smaller groups are left out, and so
    are those with more than `max_share` of the scored rows, which say nothing.

    Raises:
        ConfigError: a value that makes no sense.
    """

    threshold: float = 0.1
    aggregate: Aggregate = "mean"
    mode: GroupMode = "remove_most"
    fraction: float = 0.1
    min_members: int = 1
    max_share: float = 1.0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("aggregate", self.aggregate, get_args(Aggregate)),
            ("mode", self.mode, get_args(GroupMode)),
        ):
            if value not in choices:
                raise ConfigError(f"groups.{name} is {value!r}, which is unknown{near(value, choices)}")
        if not self.threshold >= 0 or not math.isfinite(self.threshold):
            raise ConfigError(f"groups.threshold is {self.threshold}; it must be a number of at least 0")
        if not 0 < self.fraction < 1:
            raise ConfigError(f"groups.fraction is {self.fraction}; it must lie between 0 and 1, both excluded")
        if self.min_members < 1:
            raise ConfigError(f"groups.min_members is {self.min_members}; it must be at least 1")
        if not 0 < self.max_share <= 1:
            raise ConfigError(f"groups.max_share is {self.max_share}; it must be above 0 and at most 1")

    def text(self) -> str:
        """The rule as one line, for ledgers and pages."""
        word = "highest" if self.mode == "remove_most" else "lowest"
        return (
            f"{self.mode} whole groups, {word} {self.aggregate} first, fraction>={self.fraction:g}, members>"
            f"{self.threshold:g}"
        )


@dataclass(frozen=True, eq=False)
class Tally:
    """One entry a group g; `latents` says which latent it is, in rising order.

    members: scored rows in it. influence: mean or sum of their scores. by_label: how many of them have each label of
    `names` (in order), rows without one left out. rows: scored rows of the corpus.
    """

    latents: Int[np.ndarray, " g"]
    members: Int[np.ndarray, " g"]
    influence: Float[np.ndarray, " g"]
    by_label: Int[np.ndarray, "g c"]
    names: tuple[str, ...]
    rows: int

    def order(self, mode: GroupMode = "remove_most") -> Int[np.ndarray, " g"]:
        """Groups (indices into `latents`) by falling influence, or rising for remove_least; ties: larger ones first."""
        sign = -1 if mode == "remove_most" else 1
        return np.lexsort((self.latents, -self.members, sign * self.influence))


def tally(
    blocks: Blocks,
    scores: Float[np.ndarray, " rows"],
    labels: Int[np.ndarray, " rows"],
    names: Sequence[str],
    h: int,
    rule: GroupRule,
) -> Tally:
    """One pass over the activations.

    Args:
        scores: of every row of the corpus, NaN = not scored; such rows are in no group.
        labels: index into `names`, -1 = none.

    Raises:
        ConfigError: no activation is above the threshold, or no group has between min_members and max_share members.
    """
    scored = np.isfinite(scores)
    n = int(scored.sum())
    members, total = np.zeros(h, np.int64), np.zeros(h)
    by_label = np.zeros((len(names), h), np.int64)
    highest = 0.0
    for block in blocks():
        highest = max(highest, float(block.values.data.max(initial=0.0)))
        fired = above(block, rule.threshold)
        row = np.repeat(fired.rows, np.diff(fired.values.indptr))
        good = scored[row]
        row, latent = row[good], fired.values.indices[good]
        members += np.bincount(latent, minlength=h)
        total += np.bincount(latent, scores[row], minlength=h)
        of = labels[row]
        at = of[of >= 0] * h + latent[of >= 0]
        by_label += np.bincount(at, minlength=by_label.size).reshape(by_label.shape)
    if not members.any():
        raise ConfigError(
            f"no latent is above groups.threshold={rule.threshold:g} on any of the {n} scored rows (the highest "
            f"activation is {highest:.4g}), so no group has members; lower the threshold"
        )
    kept = np.flatnonzero((members >= rule.min_members) & (members <= rule.max_share * n))
    if not kept.size:
        raise ConfigError(
            f"no group has at least {rule.min_members} members and at most {rule.max_share:g} of the {n} scored rows "
            f"(sizes are from {members[members > 0].min()} to {members.max()}); change groups.min_members or "
            f"groups.max_share"
        )
    influence = total[kept] / members[kept] if rule.aggregate == "mean" else total[kept]
    return Tally(kept, members[kept], influence, by_label[:, kept].T, tuple(names), n)


def taken_at(
    blocks: Blocks, found: Tally, orders: Sequence[Int[np.ndarray, " g"]], threshold: float, rows: int, h: int
) -> Int[np.ndarray, "orders rows"]:
    """How many groups are taken, in each order, when a row is first covered (1 = by the first group); g + 1 = never.

    One pass for all orders. Rows that are not scored are not told from others here.
    """
    g = len(found.latents)
    at = np.full((len(orders), h), g + 1, np.int64)
    for k, order in enumerate(orders):
        at[k, found.latents[order]] = np.arange(1, g + 1)
    first = np.full((len(orders), rows), g + 1, np.int64)
    for block in blocks():
        fired = above(block, threshold)
        some = np.diff(fired.values.indptr) > 0
        if some.any():
            earliest = np.minimum.reduceat(at[:, fired.values.indices], fired.values.indptr[:-1][some], axis=1)
            first[:, fired.rows[some]] = earliest
    return first


@dataclass(frozen=True, eq=False)
class Curve:
    """What the first t groups (or rows) cover: `taken` t; share of the scored rows; and, where bad rows are known,
    the share of bad rows among those covered, and the share of the bad rows that are covered (else NaN)."""

    taken: Int[np.ndarray, " t"]
    covered: Float[np.ndarray, " t"]
    precision: Float[np.ndarray, " t"]
    recall: Float[np.ndarray, " t"]


def coverage_curve(
    first: Int[np.ndarray, " rows"],
    groups: int,
    scored: Bool[np.ndarray, " rows"],
    bad: Bool[np.ndarray, " rows"] | None,
) -> Curve:
    """Cumulative coverage and precision as groups are taken; `first` is a row of `taken_at`."""
    new = np.bincount(first[scored], minlength=groups + 2)[1 : groups + 1].cumsum()
    hits = None if bad is None else np.bincount(first[scored & bad], minlength=groups + 2)[1 : groups + 1].cumsum()
    total = None if bad is None else int((scored & bad).sum())
    return _curve(np.arange(1, groups + 1), new, hits, int(scored.sum()), total)


def row_curve(scores: Float[np.ndarray, " rows"], most: bool, bad: Bool[np.ndarray, " rows"] | None) -> Curve:
    """The baseline: single rows in order of their score, highest first (or lowest); ties keep the order of the rows."""
    scored = np.flatnonzero(np.isfinite(scores))
    order = scored[np.argsort(-scores[scored] if most else scores[scored], kind="stable")]
    n = np.arange(1, len(order) + 1)
    return _curve(
        n, n, None if bad is None else bad[order].cumsum(), len(order), None if bad is None else int(bad[order].sum())
    )


def random_orders(groups: int, n: int, seed: int) -> list[Int[np.ndarray, " g"]]:
    """The control: `n` random orders of the groups."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(groups) for _ in range(n)]


def _curve(taken: np.ndarray, covered: np.ndarray, hits: np.ndarray | None, rows: int, bad: int | None) -> Curve:
    none = np.full(len(taken), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = none if hits is None else np.where(covered > 0, hits / np.maximum(covered, 1), np.nan)
        recall = none if hits is None or not bad else hits / bad
    return Curve(taken, covered / max(rows, 1), precision, recall)


@dataclass(frozen=True, eq=False)
class Removal:
    """`taken`: how many groups, the first of the order, are removed. `decision`: row by row, for shards and ledgers;
    its ranks are those of the rows' own scores."""

    taken: int
    decision: Decision


def filter_groups(
    first: Int[np.ndarray, " rows"], groups: int, scores: Float[np.ndarray, " rows"], rule: GroupRule
) -> Removal:
    """Take whole groups until at least `rule.fraction` of the scored rows is gone (paper A §4.1.3); `first` is the row
    of `taken_at` for the order of `rule`. Rows in no group stay.

    Raises:
        ConfigError: all groups together have fewer rows, or the last group that is needed leaves none.
    """
    scored = np.isfinite(scores)
    n = int(scored.sum())
    gone = np.bincount(first[scored], minlength=groups + 2)[1 : groups + 1].cumsum()
    enough = np.flatnonzero(gone >= rule.fraction * n - 1e-9 * n)
    if not enough.size:
        raise ConfigError(
            f"all {groups} groups together have {gone[-1]} of the {n} scored rows as members, less than "
            f"groups.fraction={rule.fraction:g}; lower it, or groups.threshold={rule.threshold:g}"
        )
    taken = int(enough[0]) + 1
    if gone[taken - 1] == n:
        raise ConfigError(
            f"taking {taken} groups until groups.fraction={rule.fraction:g} is gone leaves none of {n} scored rows: "
            f"the last one is too large. Lower groups.max_share={rule.max_share:g} or raise "
            f"groups.threshold={rule.threshold:g}."
        )
    keep = scored & (first > taken)
    at = np.flatnonzero(scored)
    order = at[np.argsort(-scores[at], kind="stable")]
    rank = np.full(len(scores), -1, np.int64)
    rank[order] = np.arange(n)
    quantile = np.full(len(scores), np.nan)
    quantile[order] = 1.0 - np.arange(n) / n
    removed = scores[scored & ~keep]
    cut = float(removed.min() if rule.mode == "remove_most" else removed.max())
    return Removal(taken, Decision(keep, rank, quantile, cut, len(scores), n, int(keep.sum())))
