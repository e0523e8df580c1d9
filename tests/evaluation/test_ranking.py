"""Ranking metrics against their definitions, scikit-learn with explicit resamples, and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from curate.evaluation import ranking


def labelled(n: int, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    scores = positive + rng.normal(size=n)
    return positive, np.round(scores, 1 if ties else 9)


def auc_by_pairs(positive: np.ndarray, scores: np.ndarray) -> float:
    a, b = scores[positive][:, None], scores[~positive][None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def average_precision_by_definition(positive: np.ndarray, scores: np.ndarray) -> float:
    total = 0.0
    for s in np.unique(scores[positive]):
        above = scores >= s
        total += (positive & (scores == s)).sum() / positive.sum() * positive[above].mean()
    return float(total)


@pytest.mark.parametrize("ties", [False, True])
def test_values_follow_their_definitions(ties):
    positive, scores = labelled(200, ties=ties)
    found = ranking.ranking(positive, scores)
    assert found.rows == 200
    assert found.positives == positive.sum()
    assert found.base_rate == pytest.approx(positive.mean())
    assert found.roc_auc.value == pytest.approx(auc_by_pairs(positive, scores))
    assert found.average_precision.value == pytest.approx(average_precision_by_definition(positive, scores))


def test_interval_agrees_with_resampling_rows_one_by_one():
    positive, scores = labelled(150, ties=True)
    rng = np.random.default_rng(99)
    drawn = [rng.integers(0, 150, 150) for _ in range(800)]
    found = ranking.ranking(positive, scores, replicates=2000)
    for measure, estimate in ((average_precision_score, found.average_precision), (roc_auc_score, found.roc_auc)):
        low, high = np.percentile([measure(positive[d], scores[d]) for d in drawn], [2.5, 97.5])
        assert estimate.low == pytest.approx(low, abs=0.015)
        assert estimate.high == pytest.approx(high, abs=0.015)
        assert estimate.low < estimate.value < estimate.high


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30))
def test_a_resample_given_as_counts_is_a_weighted_metric(rows):
    score, positive, weight = (np.array(v) for v in zip(*rows, strict=True))
    hits = np.array([[weight[(score == s) & positive].sum() for s in range(5, -1, -1)]], dtype=float)
    misses = np.array([[weight[(score == s) & ~positive].sum() for s in range(5, -1, -1)]], dtype=float)
    average, auc = ranking._weighted(hits, misses)[0]
    if hits.sum() == 0:
        assert not np.isfinite(average)
        return
    assert average == pytest.approx(average_precision_score(positive, score, sample_weight=weight))
    if misses.sum() > 0:
        assert auc == pytest.approx(roc_auc_score(positive, score, sample_weight=weight))


def test_merging_neighbouring_scores_hardly_moves_the_interval(monkeypatch):
    positive, scores = labelled(20_000)
    merged = ranking.ranking(positive, scores, replicates=400)
    monkeypatch.setattr(ranking, "MAX_GROUPS", 20_000)
    exact = ranking.ranking(positive, scores, replicates=400)
    for a, b in ((merged.average_precision, exact.average_precision), (merged.roc_auc, exact.roc_auc)):
        assert a.value == b.value
        assert a.low == pytest.approx(b.low, abs=0.003)
        assert a.high == pytest.approx(b.high, abs=0.003)


def test_the_same_seed_gives_the_same_interval():
    positive, scores = labelled(100)
    assert ranking.ranking(positive, scores) == ranking.ranking(positive, scores)


def test_rows_without_a_score_are_left_out():
    positive, scores = labelled(100)
    padded = np.concatenate([scores, [np.nan, np.nan]])
    assert ranking.ranking(np.concatenate([positive, [True, False]]), padded) == ranking.ranking(positive, scores)


def test_nothing_to_rank_gives_none():
    scores = np.arange(4.0)
    assert ranking.ranking(np.zeros(4, bool), scores) is None
    assert ranking.ranking(np.ones(4, bool), scores) is None
    assert ranking.ranking(np.array([True, False, True, False]), np.full(4, np.nan)) is None


def test_one_positive_gives_a_value_without_interval():
    found = ranking.ranking(np.array([False, True, False, False]), np.array([1.0, 4.0, 2.0, 3.0]))
    assert found.average_precision == ranking.Estimate(1.0, None, None)


@pytest.mark.parametrize("ties", [False, True])
def test_area_below_the_curve_is_average_precision(ties):
    positive, scores = labelled(250, ties=ties)
    recall, precision = ranking.precision_recall(positive, scores, max_points=1000)
    assert recall[0] == 0
    assert recall[-1] == 1
    assert (np.diff(recall) > 0).all()
    area = (np.diff(recall) * precision[1:]).sum()
    assert area == pytest.approx(average_precision_score(positive, scores))


def test_a_thinned_curve_keeps_its_shape():
    positive, scores = labelled(50_000)
    recall, precision = ranking.precision_recall(positive, scores)
    assert len(recall) <= 301
    area = (np.diff(recall) * precision[1:]).sum()
    assert area == pytest.approx(average_precision_score(positive, scores), abs=0.003)


def test_top_rows_counts_positives_among_the_highest():
    positive = np.array([True, False, True, False, False, False, True, False, False, False])
    scores = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, np.nan])
    rows = ranking.top_rows(positive, scores, fractions=(0.1, 0.3, 1.0))
    assert [(r.k, r.precision.value, r.recall.value) for r in rows] == [
        (1, 1.0, pytest.approx(1 / 3)),
        (3, pytest.approx(2 / 3), pytest.approx(2 / 3)),
        (9, pytest.approx(1 / 3), 1.0),
    ]


def test_rows_that_tie_at_the_kth_score_count_by_their_share():
    positive = np.array([True, True, False, False, False, True])
    scores = np.array([2.0, 1, 1, 1, 1, 0])
    (row,) = ranking.top_rows(positive, scores, fractions=(0.5,))  # the first, and two of the four that tie
    assert row.precision.value == pytest.approx((1 + 2 / 4) / 3)
    assert row.recall.value == pytest.approx((1 + 2 / 4) / 3)
    flat = ranking.top_rows(positive, np.ones(6), fractions=(0.5,))[0]
    assert flat.precision.value == pytest.approx(positive.mean())


def test_intervals_at_k_agree_with_resampling_rows_one_by_one():
    positive, scores = labelled(150)
    rng = np.random.default_rng(7)
    found = {k: [] for k in (15, 60)}
    for _ in range(1500):
        drawn = rng.integers(0, 150, 150)
        true = positive[drawn][np.argsort(-scores[drawn], kind="stable")]
        for k, values in found.items():
            values.append((true[:k].mean(), true[:k].sum() / true.sum()))
    for row in ranking.top_rows(positive, scores, fractions=(0.1, 0.4), replicates=2000):
        low, high = np.percentile(found[row.k], [2.5, 97.5], axis=0)
        for j, estimate in enumerate((row.precision, row.recall)):
            assert estimate.low == pytest.approx(low[j], abs=0.02)
            assert estimate.high == pytest.approx(high[j], abs=0.02)
            assert estimate.low <= estimate.value <= estimate.high


def test_one_row_of_a_class_has_no_interval_at_k():
    row = ranking.top_rows(np.array([True, False, False, False]), np.arange(4.0), fractions=(0.5,))[0]
    assert (row.precision.value, row.precision.low, row.recall.high) == (0.0, None, None)
    assert ranking.top_rows(np.zeros(4, bool), np.arange(4.0)) == []


def test_spearman_over_the_rows_that_both_score():
    rng = np.random.default_rng(3)
    a = np.round(rng.normal(size=80), 1)
    b = np.round(a + rng.normal(size=80), 1)
    c = -a
    b[:20] = np.nan
    matrix = ranking.spearman([a, b, c])
    assert matrix[0, 1] == pytest.approx(spearmanr(a[20:], b[20:]).statistic)
    assert matrix[1, 0] == matrix[0, 1]
    assert matrix[0, 2] == pytest.approx(-1)
    assert np.diag(matrix) == pytest.approx(1)


def test_spearman_without_spread_or_rows_is_nan():
    matrix = ranking.spearman([np.arange(5.0), np.ones(5), np.array([1.0, 2.0, np.nan, np.nan, np.nan])])
    assert np.isnan(matrix[0, 1])
    assert np.isnan(matrix[0, 2])
    assert ranking.spearman([]).shape == (0, 0)


def test_spearman_samples_a_long_table(monkeypatch):
    rng = np.random.default_rng(4)
    a = rng.normal(size=20_000)
    b = a + rng.normal(size=20_000)
    monkeypatch.setattr(ranking, "SPEARMAN_ROWS", 5_000)
    assert ranking.spearman([a, b])[0, 1] == pytest.approx(spearmanr(a, b).statistic, abs=0.03)
