"""How well a score ranks the rows that carry a label: precision–recall, AUC-PR, ROC-AUC, precision and recall at k,
agreement of scores.

In: score arrays and a boolean array of positives. Out: numbers with bootstrap intervals, and thinned curves.
Knows nothing of columns' meaning or of pages. Higher score = more of the trait, always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

# More distinct scores than this are merged (neighbouring ranks) before resampling: a resample of a million rows
# then costs as much as one of two thousand, and the interval moves by less than its own Monte Carlo error.
MAX_GROUPS = 2048
REPLICATES = 1000
SPEARMAN_ROWS = 200_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval; low and high are None where resampling makes no sense."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ranking:
    """How one column ranks `positives` of `rows` labelled rows."""

    rows: int
    positives: int
    base_rate: float
    average_precision: Estimate
    roc_auc: Estimate


@dataclass(frozen=True)
class TopRow:
    """The k rows with the highest scores: the share of them that is positive, the share of positives among them."""

    k: int
    precision: Estimate
    recall: Estimate


def _scored(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    finite = np.isfinite(scores)
    return positive[finite], scores[finite]


def ranking(
    positive: Bool[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Ranking | None:
    """AUC-PR (average precision, the step sum without interpolation) and ROC-AUC of `scores` for `positive`.

    Rows whose score is not finite are left out. The intervals are percentiles over `replicates` resamples of rows
    with replacement, so the base rate varies in them as it would in another sample. Same seed, same interval.

    Returns:
        None when no row is scored or all scored rows are of one class: nothing can be ranked.
    """
    positive, scores = _scored(positive, scores)
    n_positive = int(positive.sum())
    if n_positive == 0 or n_positive == len(positive):
        return None
    low_high = _bootstrap(positive, scores, replicates, seed)
    values = (float(average_precision_score(positive, scores)), float(roc_auc_score(positive, scores)))
    estimates = [Estimate(v, *bounds) for v, bounds in zip(values, low_high, strict=True)]
    return Ranking(len(positive), n_positive, n_positive / len(positive), estimates[0], estimates[1])


def _groups(positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives at each distinct score, highest first, at most MAX_GROUPS groups."""
    distinct, index = np.unique(scores, return_inverse=True)
    n_groups = len(distinct)
    if n_groups > MAX_GROUPS:
        below = np.cumsum(np.bincount(index, minlength=n_groups)) - 1
        index = (below * MAX_GROUPS // len(scores))[index]
        n_groups = MAX_GROUPS
    hits = np.bincount(index[positive], minlength=n_groups)
    misses = np.bincount(index[~positive], minlength=n_groups)
    return hits[::-1], misses[::-1]


def _bootstrap(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], replicates: int, seed: int
) -> tuple[tuple[float | None, float | None], tuple[float | None, float | None]]:
    hits, misses = _groups(positive, scores)
    if min(hits.sum(), misses.sum()) < 2 or replicates < 1:
        return (None, None), (None, None)
    both = np.concatenate([_weighted(*drawn) for drawn in _resamples(hits, misses, replicates, seed)])
    both = both[np.isfinite(both).all(axis=1)]  # a resample without one of the classes ranks nothing
    if len(both) < replicates / 2:
        return (None, None), (None, None)
    low, high = np.percentile(both, [2.5, 97.5], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def _resamples(
    hits: Int[np.ndarray, " g"], misses: Int[np.ndarray, " g"], replicates: int, seed: int
) -> Iterator[tuple[Float[np.ndarray, "b g"], Float[np.ndarray, "b g"]]]:
    """Counts at each score of as many rows drawn with replacement, `replicates` times, a few at once."""
    cells = np.concatenate([hits, misses])
    used = np.flatnonzero(cells)
    n, g = int(cells.sum()), len(hits)
    rng = np.random.default_rng(seed)
    for start in range(0, replicates, 50):
        size = min(50, replicates - start)
        drawn = np.zeros((size, 2 * g))
        drawn[:, used] = rng.multinomial(n, cells[used] / n, size=size)
        yield drawn[:, :g], drawn[:, g:]


def _weighted(hits: Float[np.ndarray, "b g"], misses: Float[np.ndarray, "b g"]) -> Float[np.ndarray, "b 2"]:
    """Average precision and ROC-AUC of b resamples given as counts at g scores, highest score first."""
    true, seen = hits.cumsum(axis=1), (hits + misses).cumsum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(seen > 0, true / seen, 0.0)
        average = (hits * precision).sum(axis=1) / true[:, -1]
        above = true - hits / 2  # positives above each score; those at the same score count half
        auc = (misses * above).sum(axis=1) / (true[:, -1] * misses.sum(axis=1))
    return np.stack([average, auc], axis=1)


def precision_recall(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], max_points: int = 300
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Recall (rising, from 0) and precision at the cuts where recall rises, thinned to about `max_points` of them.

    precision[i] is reached at recall[i] and holds back to recall[i − 1]: drawn as steps, the area below is AUC-PR.
    """
    positive, scores = _scored(positive, scores)
    precision, recall, _ = precision_recall_curve(positive, scores)
    precision, recall = precision[::-1], recall[::-1]  # scikit-learn starts at full recall
    rises = np.flatnonzero(np.diff(recall, prepend=0.0) > 0)
    rises = np.concatenate([rises[:1], rises])
    precision, recall = precision[rises], np.concatenate([[0.0], recall[rises[1:]]])
    if len(recall) > max_points:
        pick = np.searchsorted(recall, np.linspace(0, 1, max_points))
        pick = np.unique(np.clip(pick[1:], 1, len(recall) - 1))
        precision, recall = precision[[pick[0], *pick]], np.concatenate([[0.0], recall[pick]])
    return recall, precision


def top_rows(
    positive: Bool[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.25, 0.5),
    replicates: int = REPLICATES,
    seed: int = 0,
) -> list[TopRow]:
    """Precision@k and recall@k of the highest-scored `fractions` of the labelled, scored rows.

    Of rows that tie at the k-th score, the expected share is counted, as if they stood in random order. Intervals are
    percentiles over `replicates` resamples of rows, at the same k; without them where there are not two rows of each
    class. Empty where no row is positive.
    """
    positive, scores = _scored(positive, scores)
    if not positive.any():
        return []
    ks = np.array(sorted({max(1, int(f * len(scores) + 0.5)) for f in fractions}))
    distinct, index = np.unique(-scores, return_inverse=True)
    n_distinct = len(distinct)
    exact = (np.bincount(index[positive], minlength=n_distinct), np.bincount(index[~positive], minlength=n_distinct))
    values = _found(exact[0][None].astype(float), exact[1][None].astype(float), ks)[0]
    low = high = np.full((len(ks), 2), np.nan)
    hits, misses = _groups(positive, scores)
    if min(hits.sum(), misses.sum()) >= 2 and replicates > 0:
        drawn = np.concatenate([_found(*counts, ks) for counts in _resamples(hits, misses, replicates, seed)])
        drawn = drawn[np.isfinite(drawn).all(axis=(1, 2))]  # a resample without a positive has no recall
        if len(drawn) >= replicates / 2:
            low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [TopRow(int(k), *(_estimate(values[i, j], low[i, j], high[i, j]) for j in (0, 1))) for i, k in enumerate(ks)]


def _found(
    hits: Float[np.ndarray, "b g"], misses: Float[np.ndarray, "b g"], ks: Int[np.ndarray, " k"]
) -> Float[np.ndarray, "b k 2"]:
    """Precision and recall among the first k rows of b samples given as counts at g scores, highest score first."""
    rows, true = hits + misses, hits.cumsum(axis=1)
    seen = rows.cumsum(axis=1)
    at = np.stack([(seen < k).sum(axis=1) for k in ks], axis=1)  # the score at which the k-th row stands

    def there(counts: Float[np.ndarray, "b g"]) -> Float[np.ndarray, "b k"]:
        return np.take_along_axis(counts, at, axis=1)

    before = there(true) - there(hits)
    share = (ks - (there(seen) - there(rows))) / there(rows)
    among = before + share * there(hits)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([among / ks, among / true[:, -1:]], axis=2)


def _estimate(value: float, low: float, high: float) -> Estimate:
    known = np.isfinite(low) and np.isfinite(high)
    return Estimate(float(value), float(low) if known else None, float(high) if known else None)


def spearman(columns: list[Float[np.ndarray, " n"]], seed: int = 0) -> Float[np.ndarray, "c c"]:
    """Rank correlation of every two columns over the rows that both score; NaN below 3 rows or without spread.

    Beyond SPEARMAN_ROWS rows a seeded sample of that size is used (standard error about 0.002).
    """
    if not columns:
        return np.empty((0, 0))
    table = np.stack([np.asarray(c, dtype=np.float64) for c in columns])
    if table.shape[1] > SPEARMAN_ROWS:
        rows = np.random.default_rng(seed).choice(table.shape[1], SPEARMAN_ROWS, replace=False)
        table = table[:, np.sort(rows)]
    finite = np.isfinite(table)
    ranks = [rankdata(t) if f.all() else None for t, f in zip(table, finite, strict=True)]
    out = np.full((len(table), len(table)), np.nan)
    for i in range(len(table)):
        for j in range(i, len(table)):
            a, b = ranks[i], ranks[j]
            if a is None or b is None:
                both = finite[i] & finite[j]
                a, b = rankdata(table[i, both]), rankdata(table[j, both])
            out[i, j] = out[j, i] = _correlation(a, b)
    return out


def _correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    if len(a) < 3:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")
