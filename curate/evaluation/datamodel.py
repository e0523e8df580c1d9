"""Linear datamodelling score and leave-k-out: do the scores predict what a model becomes when it trains on other rows?

In: a bank of models retrained on parts of the rows (which rows each had, what it then did) and the scores of any
method. Out: rank correlations with bootstrap intervals. The bank is made once: it knows nothing of the methods that
are judged by it, nothing of how its models were trained, and no files (`bank_files` does).
(Ilyas et al. 2022; Park et al. 2023, TRAK, section 4.1.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from curate.errors import ConfigError
from curate.evaluation.ranking import Estimate

REPLICATES = 1000


@dataclass(frozen=True)
class Bank:
    """m retrained models. kept: bool [m, n], the rows each was trained on. outputs: float [m, q], what each then did:
    one column a query, higher = more of the trait. names: of the queries. recipe: what they all share, as JSON values
    (model, training, rows, queries).

    Models that were trained on the same rows (with other seeds) may stand beside each other; they are averaged.

    Raises:
        ConfigError: shapes that do not fit, or an output that is not finite.
    """

    kept: Bool[np.ndarray, "m n"]
    outputs: Float[np.ndarray, "m q"]
    names: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kept.ndim != 2 or self.kept.dtype != np.bool_:
            raise ConfigError(f"a bank's kept rows are {self.kept.dtype} {self.kept.shape}; want bool [models, rows]")
        if self.outputs.shape != (len(self.kept), len(self.names)):
            raise ConfigError(
                f"a bank of {len(self.kept)} models and {len(self.names)} queries has outputs of the shape "
                f"{self.outputs.shape}; want [models, queries]"
            )
        if not np.isfinite(self.outputs).all():
            model, query = (int(i[0]) for i in np.nonzero(~np.isfinite(self.outputs)))
            raise ConfigError(
                f"model {model} of the bank has the output {self.outputs[model, query]} for query "
                f"{self.names[query]!r}; leave such a model out"
            )

    @property
    def rows(self) -> int:
        return int(self.kept.shape[1])

    def averaged(self) -> Bank:
        """One model for each set of rows: the mean of those trained on it, in the order of their first ones."""
        _, first, index = np.unique(np.packbits(self.kept, axis=1), axis=0, return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(first))[index.ravel()]
        sums = np.zeros((len(first), len(self.names)))
        np.add.at(sums, place, self.outputs)
        return Bank(self.kept[np.sort(first)], sums / np.bincount(place)[:, None], self.names, self.recipe)


@dataclass(frozen=True)
class DatamodelScore:
    """value: mean over queries of the rank correlation, with its interval. by_query: of each. models: sets of rows that
    were compared."""

    score: Estimate
    by_query: tuple[float, ...]
    models: int


@dataclass(frozen=True)
class LeaveOut:
    """predicted, found [g, q]: by how much leaving each of g groups of rows out lowers the output, as the scores say
    and as it was. agreement: their rank correlation. noise: for every query the standard deviation of the output over
    models trained on all rows, None where there is one such model; `found` below it says nothing."""

    agreement: DatamodelScore
    predicted: Float[np.ndarray, "g q"]
    found: Float[np.ndarray, "g q"]
    noise: tuple[float, ...] | None


def draw_subsets(rows: int, models: int, share: float, seed: int = 0) -> Bool[np.ndarray, "models rows"]:
    """Random sets of round(share · rows) rows, one a model, all of one size: then a constant added to all scores
    predicts nothing.

    Raises:
        ConfigError: a share outside (0, 1), or of which no row or every row is left.
    """
    if not 0 < share < 1 or not 0 < round(share * rows) < rows:
        raise ConfigError(f"a share of {share} of {rows} rows is no proper part of them; choose one between 0 and 1")
    rng = np.random.default_rng(seed)
    kept = np.zeros((models, rows), dtype=bool)
    for row in kept:
        row[rng.permutation(rows)[: round(share * rows)]] = True
    return kept


def draw_left_out(rows: int, k: int, groups: int, seed: int = 0) -> Bool[np.ndarray, "groups rows"]:
    """For each of `groups` models all rows but k. The groups do not overlap as long as there are rows for that.

    Raises:
        ConfigError: k that is not between 1 and the number of rows.
    """
    if not 0 < k < rows:
        raise ConfigError(f"cannot leave {k} of {rows} rows out; choose k from 1 to {rows - 1}")
    rng = np.random.default_rng(seed)
    kept = np.ones((groups, rows), dtype=bool)
    each = rows // k
    order = np.concatenate([rng.permutation(rows)[: each * k].reshape(each, k) for _ in range(-(-groups // each))])
    for row, left_out in zip(kept, order[:groups], strict=True):
        row[left_out] = False
    return kept


def linear_datamodelling_score(
    bank: Bank,
    scores: Float[np.ndarray, " n"] | Float[np.ndarray, "n q"],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> DatamodelScore:
    """Rank correlation, over the bank's models, of Σ score of the rows kept with the output; mean over queries.

    scores: one column for all queries, or one a query. Interval: percentiles over `replicates` resamples of models
    with replacement, the same for all queries. Queries for which either side is the same for all models count in no
    mean; NaN where there is no other.

    Raises:
        ConfigError: fewer than 3 sets of rows, scores of another shape, or rows without a score.
    """
    bank = bank.averaged()
    return _agreement(bank.kept @ _checked(scores, bank), bank.outputs, replicates, seed)


def leave_k_out(
    bank: Bank,
    scores: Float[np.ndarray, " n"] | Float[np.ndarray, "n q"],
    k: int,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> LeaveOut:
    """Rank correlation, over the bank's models that lack exactly k rows, of the left-out rows' summed scores with how
    far the output fell below that of models trained on all rows (which the bank must hold; several seeds are averaged).

    Raises:
        ConfigError: no model trained on all rows, fewer than 3 that lack k, or scores that do not fit.
    """
    whole = bank.kept.all(axis=1)
    if not whole.any():
        raise ConfigError("leave-k-out compares with a model trained on all rows, and the bank holds none; add one")
    apart = bank.averaged()
    lacking = (~apart.kept).sum(axis=1) == k
    if lacking.sum() < 3:
        have = sorted(set((~apart.kept).sum(axis=1).tolist()) - {0})
        raise ConfigError(
            f"the bank holds {int(lacking.sum())} sets of rows that lack exactly {k}; leave-k-out needs at least 3 "
            f"(its models lack {', '.join(map(str, have)) or 'none'})"
        )
    predicted = ~apart.kept[lacking] @ _checked(scores, bank)
    found = bank.outputs[whole].mean(axis=0) - apart.outputs[lacking]
    predicted = np.broadcast_to(predicted, found.shape)
    noise = tuple(float(v) for v in bank.outputs[whole].std(axis=0, ddof=1)) if whole.sum() > 1 else None
    return LeaveOut(_agreement(predicted, found, replicates, seed), predicted, found, noise)


def _checked(scores: np.ndarray, bank: Bank) -> Float[np.ndarray, "n c"]:
    """As [n, 1] or [n, q]."""
    table = np.asarray(scores, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or len(table) != bank.rows or table.shape[1] not in (1, len(bank.names)):
        raise ConfigError(
            f"scores of the shape {np.shape(scores)} do not fit a bank of {bank.rows} rows and {len(bank.names)} "
            f"queries; want [rows] or [rows, queries]"
        )
    missing = int((~np.isfinite(table)).any(axis=1).sum())
    if missing:
        raise ConfigError(f"{missing} of the bank's {bank.rows} rows have no finite score; score every one of them")
    return table


def _agreement(
    predicted: Float[np.ndarray, "m c"], found: Float[np.ndarray, "m q"], replicates: int, seed: int
) -> DatamodelScore:
    m = len(found)
    if m < 3:
        raise ConfigError(f"a rank correlation over {m} sets of rows says nothing; train at least 3")
    predicted = np.broadcast_to(predicted, found.shape)
    whole = _correlations(predicted[None], found[None])[0]
    value = _mean(whole[None])[0]
    low = high = None
    if replicates > 0:
        rng = np.random.default_rng(seed)
        means = []
        for start in range(0, replicates, 50):
            drawn = rng.integers(0, m, (min(50, replicates - start), m))
            means.append(_mean(_correlations(predicted[drawn], found[drawn])))
        finite = np.concatenate(means)
        finite = finite[np.isfinite(finite)]
        if len(finite) >= replicates / 2:
            low, high = (float(v) for v in np.percentile(finite, [2.5, 97.5]))
    return DatamodelScore(Estimate(float(value), low, high), tuple(float(v) for v in whole), m)


def _correlations(a: Float[np.ndarray, "b m q"], b: Float[np.ndarray, "b m q"]) -> Float[np.ndarray, "b q"]:
    """Spearman's, along m; NaN where one side has no spread."""
    x, y = (rankdata(v, axis=1) for v in (a, b))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=1) / np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))


def _mean(correlations: Float[np.ndarray, "b q"]) -> Float[np.ndarray, " b"]:
    known = np.isfinite(correlations)
    with np.errstate(invalid="ignore"):
        return np.where(known, correlations, 0.0).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)
