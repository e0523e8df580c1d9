"""Arms of a sweep: which rows each ranking would keep, as a table, and the trainings that the arms share.

In: score columns (higher = more of the trait, NaN = not scored) and a SweepSpec. Out: a Table of Arms, each with the
key of its Training (kept rows and seed), and the Trainings, each once. Knows no text, no model and no cluster.

All arms choose among the same rows, the *pool*: those that every ranking column scores. So a method that cannot score
a row neither gains nor loses by it, and the controls (all rows, random rows) are of the same rows too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from curate.errors import ConfigError, near
from curate.selection.select import MODES, Mode, Rule, decide

RANDOM = "random"
Kind = Literal["column", "random", "full", "base"]


@dataclass(frozen=True)
class SweepSpec:
    """Arms: score column × mode × fraction × seed, and the controls (METHODS §7).

    `columns`: score columns that rank; None: all but those of the method random. `random`: random rankings a seed.
    `full`: train on all rows of the pool. `base`: the model as it is. `at_once`: trainings at the same time; None: as
    many as the cluster holds. `tuned`: influence scores differentiate the model trained on all rows with the first
    seed, where no other finetuned model is given. `trait`, `capability`: the metrics ("evaluator.metric") that the
    report is about; None: the first of that sense.

    Raises:
        ConfigError: a fraction outside (0, 1), an unknown mode, an empty or doubled entry, a number that is too small.
    """

    columns: list[str] | None = None
    modes: list[Mode] = field(default_factory=lambda: ["remove_most", "remove_least"])
    fractions: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 0.75, 0.9])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    random: int = 1
    full: bool = True
    base: bool = True
    at_once: int | None = None
    tuned: bool = True
    trait: str | None = None
    capability: str | None = None

    def __post_init__(self) -> None:
        for name in ("columns", "modes", "fractions", "seeds"):
            values: list[Any] | None = getattr(self, name)
            if values is None:
                continue
            if not values:
                raise ConfigError(f"sweep.{name} is empty; give at least one")
            doubled = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if doubled is not None:
                raise ConfigError(f"sweep.{name} has {doubled!r} twice; give each once")
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"sweep.modes has {mode!r}, which is unknown{near(mode, MODES)}")
        for fraction in self.fractions:
            if not 0.0 < fraction < 1.0:
                raise ConfigError(f"sweep.fractions has {fraction}; each must lie between 0 and 1, both excluded")
        if min(self.seeds) < 0:
            raise ConfigError(f"sweep.seeds has {min(self.seeds)}; a seed must not be negative")
        if self.random < 0:
            raise ConfigError(f"sweep.random is {self.random}; it must not be negative")
        if self.at_once is not None and self.at_once < 1:
            raise ConfigError(f"sweep.at_once is {self.at_once}; it must be at least 1")


@dataclass(frozen=True)
class Arm:
    """One point of the sweep. `method`: the column, or random, full, base. `training`: key of what it is trained on,
    None for the base model. `rows`: of the pool that are kept; `removed`: the share of the pool that is not."""

    key: str
    kind: Kind
    method: str
    mode: Mode | None
    fraction: float | None
    seed: int | None
    training: str | None
    rows: int
    removed: float


@dataclass(frozen=True)
class Training:
    """One fine-tune: the rows of the corpus that it is given, by global row, and its seed."""

    key: str
    keep: Bool[np.ndarray, " n"]
    seed: int
    rows: int


@dataclass(frozen=True)
class Table:
    """`arms` in the order that a reader expects them; `trainings` by key, in the order to run them. `pool`: rows that
    every column scores, of `total`."""

    arms: tuple[Arm, ...]
    trainings: Mapping[str, Training]
    columns: tuple[str, ...]
    pool: Bool[np.ndarray, " n"]
    total: int

    @property
    def pool_rows(self) -> int:
        return int(self.pool.sum())


def ranking_columns(scored: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The columns that rank: `wanted`, or all of `scored` but the method random's, which are controls.

    Raises:
        ConfigError: a column that was not scored, or none is left.
    """
    for name in wanted or ():
        if name not in scored:
            raise ConfigError(f"sweep.columns has {name!r}, which was not scored{near(name, scored)}")
    found = [c for c in scored if c != RANDOM] if wanted is None else list(wanted)
    if not found:
        raise ConfigError(f"no score column is left to rank by (scored: {', '.join(scored) or 'none'}); choose scorers")
    return found


def rows_digest(keep: Bool[np.ndarray, " n"]) -> str:
    """Name of a set of rows: hash of their global numbers."""
    return hashlib.blake2b(np.flatnonzero(keep).astype("<i8").tobytes(), digest_size=12).hexdigest()


def make_table(columns: Mapping[str, Float[np.ndarray, " n"]], sweep: SweepSpec) -> Table:
    """All arms of `sweep` over `columns`, with what is trained once for several of them.

    A random arm draws its rows uniformly, another draw for each seed and ranking; as the modes of a random ranking are
    alike, there is one for every number of rows that an arm of a column keeps.

    Raises:
        ConfigError: no column, no row that all columns score, columns of several lengths, an arm with no rows left, or
            a column whose arms would have the names of the random controls.
    """
    if not columns:
        raise ConfigError("a sweep needs at least one score column")
    if RANDOM in columns and sweep.random:
        raise ConfigError(
            f"sweep.columns has {RANDOM!r}, and sweep.random={sweep.random} asks for random controls of the same name; "
            f"leave the column out, or set sweep.random=0"
        )
    sizes = {len(values) for values in columns.values()}
    if len(sizes) > 1:
        raise ConfigError(f"the score columns have several lengths ({sorted(sizes)}); they must be of the same rows")
    scored = {name: np.isfinite(np.asarray(values, dtype=np.float64)) for name, values in columns.items()}
    pool = np.logical_and.reduce(list(scored.values()))
    if not pool.any():
        counts = ", ".join(f"{name}: {int(s.sum())}" for name, s in scored.items())
        raise ConfigError(f"no row is scored by all columns of the sweep ({counts} of {pool.size}); leave one out")
    return _Maker(sweep, pool).table(columns)


class _Maker:
    """Collects arms and trainings; each set of rows is kept once, whatever the number of arms and seeds."""

    def __init__(self, sweep: SweepSpec, pool: Bool[np.ndarray, " n"]) -> None:
        self.sweep, self.pool, self.size = sweep, pool, int(pool.sum())
        self.arms: list[Arm] = []
        self.trainings: dict[str, Training] = {}
        self.masks: dict[str, np.ndarray] = {}

    def table(self, columns: Mapping[str, Float[np.ndarray, " n"]]) -> Table:
        s = self.sweep
        if s.base:
            self.arms.append(Arm("base", "base", "base", None, None, None, None, 0, 1.0))
        if s.full:
            self._add("full", "full", None, None, self.pool)
        for fraction, left in self._amounts():
            for ranking in range(s.random):
                self._random(fraction, left, ranking)
        for name, values in columns.items():
            inside = np.where(self.pool, np.asarray(values, dtype=np.float64), np.nan)
            for mode in s.modes:
                for fraction in s.fractions:
                    keep = self._kept(inside, Rule(mode, fraction), f"{name}, {mode} {fraction:g}")
                    self._add("column", name, mode, fraction, keep)
        return Table(tuple(self.arms), self.trainings, tuple(columns), self.pool, self.pool.size)

    def _kept(self, values: Float[np.ndarray, " n"], rule: Rule, arm: str) -> Bool[np.ndarray, " n"]:
        try:
            return decide(values, rule).keep
        except ConfigError as e:
            raise ConfigError(f"the arm {arm!r} cannot be trained: {e}") from None

    def _amounts(self) -> list[tuple[float, int]]:
        """(share removed, rows left) of all rules, once for every number of rows left."""
        found: dict[int, float] = {}
        values = np.where(self.pool, 0.0, np.nan)
        for mode in self.sweep.modes:
            for fraction in self.sweep.fractions:
                rule = Rule(mode, fraction)
                left = int(self._kept(values, rule, f"{RANDOM}, {mode} {fraction:g}").sum())
                found.setdefault(left, fraction if rule.removes else round(1.0 - fraction, 12))
        return sorted(((fraction, left) for left, fraction in found.items()), key=lambda x: -x[1])

    def _random(self, fraction: float, left: int, ranking: int) -> None:
        rows = np.flatnonzero(self.pool)
        for seed in self.sweep.seeds:
            # Nested: the rows removed at a smaller fraction are among those removed at a larger one, as in a ranking.
            order = np.random.default_rng([seed, ranking]).permutation(rows)
            keep = np.zeros(self.pool.size, dtype=bool)
            keep[order[:left]] = True
            name = RANDOM if self.sweep.random == 1 else f"{RANDOM}.{ranking}"
            self._one("random", name, "remove_most", fraction, keep, seed)

    def _add(
        self, kind: Kind, method: str, mode: Mode | None, fraction: float | None, keep: Bool[np.ndarray, " n"]
    ) -> None:
        for seed in self.sweep.seeds:
            self._one(kind, method, mode, fraction, keep, seed)

    def _one(
        self,
        kind: Kind,
        method: str,
        mode: Mode | None,
        fraction: float | None,
        keep: Bool[np.ndarray, " n"],
        seed: int,
    ) -> None:
        rows = int(keep.sum())
        digest = rows_digest(keep)
        training = f"{digest}-s{seed}"
        if training not in self.trainings:
            self.trainings[training] = Training(training, self.masks.setdefault(digest, keep), seed, rows)
        parts = [method, *([mode, f"{fraction:g}"] if mode is not None else []), f"s{seed}"]
        removed = 1.0 - rows / self.size
        self.arms.append(Arm("/".join(parts), kind, method, mode, fraction, seed, training, rows, removed))
