"""Selection against a slow oracle in plain Python, and its refusals."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import ConfigError
from curate.selection.select import MODES, Rule, decide

NAN = float("nan")


def half_up(fraction: float, n: int) -> int:
    """Exact decimal arithmetic: 0.29 means twenty-nine hundredths."""
    return int((Fraction(str(fraction)) * n + Fraction(1, 2)) // 1)


def oracle(scores: list[float], rule: Rule, groups: list[str | None] | None = None) -> list[bool] | None:
    """Keep flags by sorting Python lists; None where nothing would be left."""
    members: dict[str, list[int]] = {}
    for i, s in enumerate(scores):
        if s == s:
            members.setdefault((groups[i] or "") if rule.per_group and groups else "", []).append(i)
    keep = [False] * len(scores)
    for rows in members.values():
        ranked = sorted(rows, key=lambda i: (-scores[i], i))
        n = len(ranked)
        if rule.threshold is not None:
            k = sum(scores[i] >= rule.threshold if rule.most else scores[i] <= rule.threshold for i in rows)
        elif rule.count is not None:
            k = min(rule.count, n)
        elif rule.per_group:
            k = half_up(rule.fraction, n)
            k = min(k, n - 1) if rule.removes else max(k, 1)
        else:
            k = max(half_up(rule.fraction, n), 1)
        chosen = set(ranked[:k] if rule.most else ranked[n - k :])
        for i in rows:
            keep[i] = (i not in chosen) if rule.removes else (i in chosen)
    return keep if any(keep) else None


score_lists = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6), st.just(NAN)), min_size=1, max_size=40
).filter(lambda xs: any(x == x for x in xs))
amounts = st.one_of(
    st.integers(1, 99).map(lambda f: {"fraction": f / 100}),
    st.integers(1, 40).map(lambda c: {"count": c}),
    st.integers(-4, 4).map(lambda t: {"threshold": float(t)}),
)


@settings(max_examples=300, deadline=None)
@given(score_lists, st.sampled_from(MODES), amounts, st.booleans(), st.randoms())
def test_equals_the_oracle(scores, mode, amount, per_group, random):
    groups = [random.choice(["a", "b", None]) for _ in scores]
    if all(g is None for g in groups):
        per_group = False
    rule = Rule(mode, **amount, per_group=per_group)
    expected = oracle(scores, rule, groups)
    sizes: dict = {}
    for s, g in zip(scores, groups, strict=True):
        if s == s:
            sizes[g if per_group else 0] = sizes.get(g if per_group else 0, 0) + 1
    if expected is None or (rule.count is not None and rule.count > max(sizes.values())):
        with pytest.raises(ConfigError):
            decide(np.array(scores), rule, groups)
        return
    decision = decide(np.array(scores), rule, groups)
    assert decision.keep.tolist() == expected
    assert decision.n_kept == sum(expected)
    assert decision.n_scored + decision.n_unscored == len(scores)
    assert decision.n_kept + decision.n_dropped == decision.n_scored


@settings(max_examples=100, deadline=None)
@given(score_lists)
def test_ranks_are_a_permutation_in_score_order(scores):
    values = np.array(scores)
    decision = decide(values, Rule("keep_most", threshold=-1e9))
    scored = ~np.isnan(values)
    assert sorted(decision.rank[scored].tolist()) == list(range(int(scored.sum())))
    assert (decision.rank[~scored] == -1).all()
    by_rank = np.flatnonzero(scored)[np.argsort(decision.rank[scored])]
    for a, b in itertools.pairwise(by_rank):
        assert values[a] > values[b] or (values[a] == values[b] and a < b)
    n = scored.sum()
    np.testing.assert_allclose(decision.quantile[scored], (n - decision.rank[scored]) / n)
    assert np.isnan(decision.quantile[~scored]).all()


def test_the_four_modes_in_one_glance():
    scores = np.array([0.1, 0.9, 0.5, 0.7, 0.3])
    kept = {mode: np.flatnonzero(decide(scores, Rule(mode, count=2)).keep).tolist() for mode in MODES}
    assert kept == {
        "remove_most": [0, 2, 4],
        "remove_least": [1, 2, 3],
        "keep_most": [1, 3],
        "keep_least": [0, 4],
    }


@pytest.mark.parametrize("n", range(2, 60))
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.29, 0.35, 0.5, 0.75])
def test_fraction_rounds_half_up_to_at_least_one(n, fraction):
    scores = np.arange(n, dtype=float)
    assert decide(scores, Rule("keep_most", fraction=fraction)).n_kept == max(1, half_up(fraction, n))


def test_removing_and_keeping_are_complements():
    scores = np.random.default_rng(0).integers(0, 5, 101).astype(float)
    for k in (1, 13, 100):
        removed = decide(scores, Rule("remove_most", count=k)).keep
        assert (removed == ~decide(scores, Rule("keep_most", count=k)).keep).all()
        assert (removed == decide(scores, Rule("keep_least", count=101 - k)).keep).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_cut_used_as_a_threshold_chooses_the_same_rows(mode):
    scores = np.random.default_rng(1).normal(size=200)
    first = decide(scores, Rule(mode, fraction=0.3))
    again = decide(scores, Rule(mode, threshold=first.cut))
    assert (first.keep == again.keep).all()
    assert again.cut == first.cut


def test_a_group_has_its_own_cut_and_a_single_row_stays():
    scores = np.array([1.0, 2.0, 3.0, 4.0, 9.0, NAN])
    groups = ["x", "x", "x", "x", "y", "y"]
    decision = decide(scores, Rule("remove_most", fraction=0.5, per_group=True), groups)
    assert decision.keep.tolist() == [True, True, False, False, True, False]
    assert decision.cut == {"x": 3.0}
    assert decision.rank.tolist() == [3, 2, 1, 0, 0, -1]


def test_threshold_that_removes_nothing_keeps_everything():
    assert decide(np.array([1.0, 2.0]), Rule("remove_most", threshold=5.0)).keep.all()


def test_infinite_scores_are_ranked():
    decision = decide(np.array([1.0, np.inf, -np.inf]), Rule("keep_most", count=1))
    assert decision.rank.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"mode": "remove_mots", "fraction": 0.1}, r"'remove_mots'.*did you mean 'remove_most'"),
        ({"mode": "keep_most"}, r"exactly one of .*none of them"),
        ({"mode": "keep_most", "fraction": 0.1, "count": 3}, r"found fraction and count"),
        ({"mode": "keep_most", "fraction": 0.0}, r"selector.fraction is 0.0.*between 0 and 1"),
        ({"mode": "keep_most", "fraction": 1.0}, r"selector.fraction is 1.0"),
        ({"mode": "keep_most", "fraction": NAN}, r"selector.fraction is nan"),
        ({"mode": "keep_most", "count": 0}, r"selector.count is 0.*at least 1"),
        ({"mode": "keep_most", "count": 2.5}, r"selector.count is 2.5"),
        ({"mode": "keep_most", "count": True}, r"must be a number"),
        ({"mode": "keep_most", "threshold": NAN}, r"threshold is NaN"),
        ({"mode": "keep_most", "threshold": "high"}, r"threshold is 'high'"),
    ],
)
def test_a_rule_that_cannot_be_meant(settings_, message):
    with pytest.raises(ConfigError, match=message):
        Rule(**settings_)


@pytest.mark.parametrize(
    ("scores", "rule", "groups", "message"),
    [
        ([1.0, 2.0], Rule("keep_most", count=3), None, r"count is 3.*only 2 scored rows"),
        ([1.0, NAN], Rule("keep_most", count=2), None, r"only 1 scored rows"),
        ([1.0, 2.0], Rule("remove_most", count=2), None, r"leaves none of the 2 scored rows"),
        ([1.0], Rule("remove_most", fraction=0.1), None, r"leaves none"),
        ([1.0, 2.0], Rule("keep_most", threshold=7.0), None, r"scores from 1 to 2"),
        ([NAN, NAN], Rule("keep_most", count=1), None, r"none of the 2 rows has a score"),
        ([], Rule("keep_most", count=1), None, r"none of the 0 rows"),
        ([1.0, 2.0], Rule("keep_most", count=1, per_group=True), None, r"source.columns.group"),
        ([1.0, 2.0], Rule("keep_most", count=1, per_group=True), [None, None], r"source.columns.group"),
        ([1.0, 2.0], Rule("keep_most", count=1, per_group=True), ["a"], r"1 groups for 2 scores"),
        ([1.0, 2.0], Rule("keep_most", count=2, per_group=True), ["a", "b"], r"largest group has only 1"),
    ],
)
def test_a_rule_that_does_not_fit_the_scores(scores, rule, groups, message):
    with pytest.raises(ConfigError, match=message):
        decide(np.array(scores), rule, groups)


def test_a_million_rows_in_under_two_seconds():
    scores = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    groups = np.array([f"group {i}" for i in range(50)], dtype=object)[np.arange(scores.size) % 50]
    for rule, names in (
        (Rule("remove_most", fraction=0.25), None),
        (Rule("keep_least", fraction=0.1, per_group=True), groups),
    ):
        start = time.process_time()
        decision = decide(scores, rule, names)
        assert time.process_time() - start < 2.0
        assert decision.n_kept == (750_000 if names is None else 100_000)


def test_the_rule_as_a_line():
    assert Rule("remove_most", fraction=0.25).text() == "remove_most fraction=0.25"
    assert Rule("keep_least", count=10, per_group=True).text() == "keep_least count=10 per group"
