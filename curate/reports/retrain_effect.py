"""What removing rows did: arms gathered over their seeds, and how far each score moved the measure.

In: RetrainData. Out: groups of arms that differ only in their seed, the random band, one Effect a score column.
Knows nothing of HTML and of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import t

from curate.reports.retrain_data import ArmView, RetrainData

MODE_ORDER = ("remove_most", "remove_least", "keep_least", "keep_most")


@dataclass(frozen=True)
class Group:
    """Arms that differ only in their seed (for random ones: also in draw and mode). values: of the arms that have one.
    `removed`: share of rows, None for the base model. interval: mean of the arms' own intervals, where all have one."""

    kind: str
    column: str | None
    mode: str | None
    fraction: float | None
    removed: float | None
    arms: tuple[ArmView, ...]
    values: tuple[float, ...]
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.values)) if self.values else None


@dataclass(frozen=True)
class Effect:
    """How a score moved the measure. most, least: mean difference from the random arms that lost as many rows, when its
    highest- or lowest-scored rows are removed (mean over fractions and seeds; None where there is nothing to compare).
    apart: `least` minus `most` arms at the same share removed, mean over the shares; above zero where the score is
    right. by_seed: the same of each seed. low, high: 95 % t-interval of its mean over seeds, None below two seeds.
    chance: how far chance alone came, see `luck`; None where it is not known.
    """

    column: str | None
    most: float | None
    least: float | None
    apart: float | None
    by_seed: tuple[float, ...]
    low: float | None
    high: float | None
    chance: float | None = None

    @property
    def verdict(self) -> str:
        """right, wrong, unclear (the interval holds zero, or two random rankings came as far apart), single (one seed:
        no interval) or none (nothing measured). With few seeds an interval is narrow by luck too often to be asked
        alone; where chance is not known it is, and the page says so.
        """
        if self.apart is None:
            return "none"
        if self.low is None or self.high is None:
            return "single"
        if self.low <= 0 <= self.high or (self.chance is not None and abs(self.apart) <= self.chance):
            return "unclear"
        return "right" if self.low > 0 else "wrong"


def removes_most(mode: str | None) -> bool | None:
    """Whether the mode takes the highest-scored rows away (remove_most, keep_least); None without a mode."""
    return None if mode is None else mode in ("remove_most", "keep_least")


def group_arms(data: RetrainData, key: str, arms: Sequence[ArmView]) -> Group:
    """`arms` as one group, measured by `key`."""
    first = arms[0]
    values, bounds = [], []
    for arm in arms:
        value = data.value(arm, key)
        if value is not None:
            values.append(value)
            bounds.append((arm.measures[key].low, arm.measures[key].high))
    known = [(low, high) for low, high in bounds if low is not None and high is not None]
    interval = None
    if known and len(known) == len(bounds):
        low, high = np.mean(known, axis=0)
        interval = (float(low), float(high))
    return Group(
        first.kind, first.column, first.mode, first.fraction, first.removed, tuple(arms), tuple(values), interval
    )


def groups(data: RetrainData, key: str) -> list[Group]:
    """Method arms by column, mode and fraction, in the order of columns; then random ones by share removed, then the
    full set and the base model. Arms that failed are in `arms`, never in `values`."""
    found: dict[tuple, list[ArmView]] = {}
    for arm in data.arms:
        share = None if arm.removed is None else round(arm.removed, 6)
        own = (arm.column, arm.mode) if arm.kind == "method" else (None, None)
        found.setdefault((arm.kind, *own, share), []).append(arm)
    order = {name: i for i, name in enumerate(data.columns)}
    kinds = ("method", "random", "full", "base")

    def place(group: Group) -> tuple:
        column = order.get(group.column or "", -1) if group.kind == "method" else -1
        mode = MODE_ORDER.index(group.mode) if group.kind == "method" and group.mode else -1
        return kinds.index(group.kind), column, mode, group.removed or 0.0

    return sorted((group_arms(data, key, arms) for arms in found.values()), key=place)


def effects(data: RetrainData, key: str) -> list[Effect]:
    """One of each column, in order; then one of the random rankings (column None), where they have modes."""
    everything = groups(data, key)
    chance = {g.removed: g.mean for g in everything if g.kind == "random" and g.mean is not None}
    out = []
    for column in (*data.columns, None):
        arms = [a for a in data.arms if (a.column == column if column else a.kind == "random")]
        arms = [a for a in arms if a.kind in ("method", "random") and data.value(a, key) is not None]
        if column is None and not {removes_most(a.mode) for a in arms} >= {True, False}:
            continue
        out.append(_effect(data, key, column, arms, chance))
    found = luck(data, key)
    return [replace(e, chance=found) for e in out]


def luck(data: RetrainData, key: str) -> float | None:
    """How far apart models come that differ by chance alone: the largest |difference|, as mean over the shares removed
    that both have, of two random rankings. Of one seed where a seed has several (or both ends of one are removed, which
    is the same thing); else of any two, less what the seeds themselves differ by in the arms of the methods, as “apart”
    is a difference within a seed. None below two.
    """
    rankings: dict[tuple[int | None, str | None, bool | None], dict[float, float]] = {}
    methods: dict[int | None, dict[tuple, float]] = {}
    for arm in data.arms:
        value, removed = data.value(arm, key), arm.removed
        if value is None or removed is None:
            continue
        share = round(removed, 6)
        if arm.kind == "random":
            rankings.setdefault((arm.seed, arm.column, removes_most(arm.mode)), {})[share] = value
        elif arm.kind == "method":
            methods.setdefault(arm.seed, {})[arm.column, arm.mode, share] = value
    pairs = list(combinations(rankings, 2))
    pairs = [(a, b) for a, b in pairs if a[0] == b[0]] or pairs
    apart = []
    for a, b in pairs:
        found = _mean_difference(rankings[a], rankings[b])
        seeds = _mean_difference(methods.get(a[0], {}), methods.get(b[0], {})) or 0.0
        apart += [abs(found - seeds)] if found is not None else []
    return max(apart, default=None)


def _mean_difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> float | None:
    """Mean of a − b over what both have; None where that is nothing."""
    both = sorted(a.keys() & b.keys(), key=str)
    return float(np.mean([a[k] - b[k] for k in both])) if both else None


def _effect(
    data: RetrainData,
    key: str,
    column: str | None,
    arms: Sequence[ArmView],
    chance: Mapping[float | None, float | None],
) -> Effect:
    values: dict[tuple[bool, float, int | None], list[float]] = {}
    for arm in arms:
        most, value, removed = removes_most(arm.mode), data.value(arm, key), arm.removed
        if most is not None and value is not None and removed is not None:
            values.setdefault((most, round(removed, 6), arm.seed), []).append(value)
    means = {where: float(np.mean(found)) for where, found in values.items()}

    def against_chance(most: bool) -> float | None:
        at: dict[float, list[float]] = {}
        for (side, removed, _), value in means.items():
            control = next((c for r, c in chance.items() if r is not None and abs(r - removed) < 1e-6), None)
            if side is most and control is not None:
                at.setdefault(removed, []).append(value - control)
        return float(np.mean([np.mean(found) for found in at.values()])) if at else None

    by_seed = []
    seeds = sorted({seed for _, _, seed in means}, key=str)
    shares = sorted({removed for _, removed, _ in means})
    # The same shares for every seed: else a seed that lacks the strongest arm would look weaker than the others.
    both = [r for r in shares if all((side, r, s) in means for s in seeds for side in (True, False))]
    for seed in seeds:
        pairs = [(False, r, seed) for r in both]
        if pairs:
            by_seed.append(float(np.mean([means[p] - means[(True, *p[1:])] for p in pairs])))
    low, high = t_interval(by_seed)
    sides = (None, None) if column is None else (against_chance(True), against_chance(False))
    apart = float(np.mean(by_seed)) if by_seed else None
    return Effect(column, *sides, apart, tuple(by_seed), low, high)


def t_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean of `values` by Student's t; (None, None) below two values."""
    if len(values) < 2:
        return None, None
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def front(points: Sequence[tuple[float, float]], better: tuple[int, int]) -> list[int]:
    """Indices of the points that no other one beats, by rising first coordinate.

    better: +1 where more of a coordinate is better, −1 where less is. A point is beaten by one that is at least as
    good in both coordinates and better in one; of equal points all stay.
    """
    signed = np.array(points, dtype=float).reshape(-1, 2) * better
    kept = [i for i, p in enumerate(signed) if not ((signed >= p).all(axis=1) & (signed > p).any(axis=1)).any()]
    return sorted(kept, key=lambda i: (points[i][0], points[i][1], i))
