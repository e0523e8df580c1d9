"""The held-out profile against brute force, and the rule that picks a layer."""

from __future__ import annotations

import numpy as np
import pytest

from curate.concepts.layer_profile import group_folds, layer_profile, recommend, stratified_folds


def mean_difference(x, y):
    return x[y].mean(axis=0) - x[~y].mean(axis=0)


def test_folds_keep_groups_together_and_are_deterministic():
    fold = group_folds(["a", "b", "a", "c", "b", "d"], 2)
    assert fold.tolist() == [0, 1, 0, 0, 1, 1]
    assert group_folds(["a", "a"], 5) is None
    assert group_folds([0, 1, 2], 5).tolist() == [0, 1, 2]


def test_stratified_folds_deal_out_both_classes():
    y = np.array([True] * 7 + [False] * 3)
    fold = stratified_folds(y, 5)
    assert set(fold) == {0, 1, 2}
    for k in range(3):
        assert y[fold == k].any()
        assert not y[fold == k].all()
    assert stratified_folds(np.array([True, False, False]), 5) is None


def test_profile_equals_pair_counting():
    rng = np.random.default_rng(0)
    n, rows, d = 40, 3, 6
    y = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, rows, d)) + y[:, None, None] * np.array([0.0, 0.5, 2.0])[None, :, None]
    groups = np.arange(n) // 4
    fold = group_folds(groups.tolist(), 5)
    vectors = np.stack([mean_difference(x[:, k], y) for k in range(rows)]).astype(np.float32)
    profile = layer_profile(x, y, fold, vectors, mean_difference)
    for row in range(rows):
        # every example on the direction made without its own group's fold
        p = np.empty(n)
        for i in range(n):
            keep = np.array([(g % 5) != (groups[i] % 5) for g in groups])
            a, b = x[keep & y, row].mean(0), x[keep & ~y, row].mean(0)
            v = (a - b) / np.linalg.norm(a - b)
            p[i] = v @ x[i, row] - v @ (a + b) / 2
        wins = [float(a > b) + 0.5 * (a == b) for a in p[y] for b in p[~y]]
        assert profile[row]["auc"] == pytest.approx(np.mean(wins))
        sd = np.sqrt(((n / 2 - 1) * p[y].var(ddof=1) + (n / 2 - 1) * p[~y].var(ddof=1)) / (n - 2))
        assert profile[row]["separation"] == pytest.approx((p[y].mean() - p[~y].mean()) / sd)
        assert profile[row]["norm"] == pytest.approx(np.linalg.norm(vectors[row]), rel=1e-6)
    assert profile[2]["auc"] > 0.95


def test_noise_is_not_flattered():
    """In-sample separation of noise in a wide space is perfect; held out it is chance."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 1, 300))
    y = np.arange(200) % 2 == 0
    v = mean_difference(x[:, 0], y)[None]
    profile = layer_profile(x, y, stratified_folds(y, 5), v, mean_difference)
    assert 0.35 < profile[0]["auc"] < 0.65


def test_undefined_layers_and_no_folds():
    x = np.random.default_rng(2).normal(size=(10, 3, 4))
    y = np.arange(10) < 5
    vectors = np.stack([np.full(4, np.nan), np.zeros(4), np.ones(4)])
    profile = layer_profile(x, y, None, vectors, mean_difference)
    assert [p["norm"] for p in profile] == [None, None, 2.0]
    assert [p["auc"] for p in profile] == [None, None, None]


def entries(aucs, norm=1.0, separations=None):
    separations = separations or [1.0] * len(aucs)
    return [
        {"layer": i, "norm": norm, "auc": a, "separation": s}
        for i, (a, s) in enumerate(zip(aucs, separations, strict=True))
    ]


def test_recommended_layer_lies_in_the_middle_half():
    aucs = [0.99, 0.98, 0.6, 0.7, 0.8, 0.7, 0.6, 0.99, 0.99]  # L = 8: layers 2 to 6
    assert recommend(entries(aucs))[0] == 4
    assert recommend(entries([1.0] * 9))[0] == 2  # ties: the lower layer
    assert recommend(entries([1.0] * 9, separations=[9, 9, 1, 2, 3, 2, 1, 9, 9]))[0] == 4  # … after separation


def test_recommendation_without_held_out_figures_or_middle_layers():
    layer, why = recommend(entries([None] * 9))
    assert (layer, "nearest to the middle" in why) == (4, True)
    assert recommend(entries([0.9, 0.8]))[0] == 1  # one block
    only = entries([0.5] * 9)
    for p in only[1:]:
        p["norm"] = None
    assert recommend(only)[0] == 0
    assert recommend(entries([None] * 3, norm=None))[0] is None
