"""Groups by latents, recomputed with plain dicts and sets; precision by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_score, recall_score

from curate.errors import ConfigError
from curate.selection.groups import (
    GroupRule,
    coverage_curve,
    filter_groups,
    random_orders,
    row_curve,
    taken_at,
    tally,
)
from tests.concepts.test_latent_rows import dense_rows, in_blocks

N, H = 60, 15
NAMES = ("plain", "bad")


@pytest.fixture(scope="module")
def given():
    table = dense_rows(N, H, 7)
    table[50:] = 0  # in no group
    rng = np.random.default_rng(8)
    scores = rng.normal(size=N)
    scores[[3, 20]] = np.nan
    labels = rng.integers(-1, 2, N)
    return table, scores, labels


def members(table, scores, threshold) -> dict[int, set[int]]:
    return {
        j: {i for i in range(N) if table[i, j] > threshold and not np.isnan(scores[i])}
        for j in range(H)
        if any(table[i, j] > threshold and not np.isnan(scores[i]) for i in range(N))
    }


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_members_influence_and_labels_by_sets(given, aggregate, threshold):
    table, scores, labels = given
    rule = GroupRule(threshold, aggregate)
    found = tally(in_blocks(table), scores, labels, NAMES, H, rule)
    groups = members(table, scores, threshold)
    assert found.latents.tolist() == sorted(groups)
    assert found.rows == N - 2
    for g, j in enumerate(found.latents.tolist()):
        of = groups[j]
        total = sum(scores[i] for i in of)
        assert found.members[g] == len(of)
        assert found.influence[g] == pytest.approx(total if aggregate == "sum" else total / len(of))
        assert found.by_label[g].tolist() == [sum(labels[i] == c for i in of) for c in range(2)]
    order = found.order()
    assert (np.diff(found.influence[order]) <= 0).all()
    assert found.order("remove_least").tolist() == order[::-1].tolist()


def test_sizes_that_are_left_out(given):
    table, scores, labels = given
    found = tally(in_blocks(table), scores, labels, NAMES, H, GroupRule(0.1, min_members=5, max_share=0.4))
    sizes = {j: len(of) for j, of in members(table, scores, 0.1).items()}
    assert found.latents.tolist() == [j for j, n in sorted(sizes.items()) if 5 <= n <= 0.4 * (N - 2)]
    assert len(found.latents) < len(sizes)


@pytest.mark.parametrize("mode", ["remove_most", "remove_least"])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6])
def test_whole_groups_go_until_the_share_is_gone(given, mode, fraction):
    table, scores, labels = given
    rule = GroupRule(0.5, mode=mode, fraction=fraction)
    found = tally(in_blocks(table), scores, labels, NAMES, H, rule)
    order = found.order(mode)
    groups, gone, taken = members(table, scores, 0.5), set(), 0
    while len(gone) < fraction * (N - 2):
        gone |= groups[int(found.latents[order[taken]])]
        taken += 1
    (first,) = taken_at(in_blocks(table), found, [order], 0.5, N, H)
    removal = filter_groups(first, len(order), scores, rule)
    assert removal.taken == taken
    kept = set(range(N)) - gone - {3, 20}
    assert set(np.flatnonzero(removal.decision.keep)) == kept
    assert removal.decision.n_dropped == len(gone)
    assert removal.decision.n_unscored == 2
    # Ranks are those of the rows' own scores.
    ranked = np.argsort(-np.nan_to_num(scores, nan=-np.inf))[: N - 2]
    assert removal.decision.rank[ranked].tolist() == list(range(N - 2))
    assert removal.decision.rank[3] == -1
    # No group is cut in two: every member of a taken group is gone.
    for g in order[:taken]:
        assert not removal.decision.keep[list(groups[int(found.latents[g])])].any()


def test_curves_by_sets(given):
    table, scores, labels = given
    found = tally(in_blocks(table), scores, labels, NAMES, H, GroupRule(0.5))
    groups, bad = members(table, scores, 0.5), labels == 1
    orders = [found.order(), *random_orders(len(found.latents), 2, 0)]
    scored = np.isfinite(scores)
    for order, first in zip(orders, taken_at(in_blocks(table, 9), found, orders, 0.5, N, H), strict=True):
        assert sorted(order) == list(range(len(found.latents)))
        curve = coverage_curve(first, len(order), scored, bad)
        covered: set[int] = set()
        for t, g in enumerate(order):
            covered |= groups[int(found.latents[g])]
            mark = np.isin(np.arange(N), list(covered))[scored]
            assert curve.taken[t] == t + 1
            assert curve.covered[t] == pytest.approx(len(covered) / (N - 2))
            assert curve.precision[t] == pytest.approx(precision_score(bad[scored], mark))
            assert curve.recall[t] == pytest.approx(recall_score(bad[scored], mark))
    assert np.isnan(coverage_curve(first, len(order), scored, None).precision).all()


def test_single_rows_are_the_baseline(given):
    _, scores, labels = given
    bad = labels == 1
    for most in (True, False):
        curve = row_curve(scores, most, bad)
        ranked = sorted(
            (i for i in range(N) if not np.isnan(scores[i])), key=lambda i: -scores[i] if most else scores[i]
        )
        for k in (1, 7, len(ranked)):
            assert curve.precision[k - 1] == pytest.approx(np.mean([bad[i] for i in ranked[:k]]))
            assert curve.covered[k - 1] == pytest.approx(k / len(ranked))


def test_bad_rows_with_a_latent_of_their_own_go_alone(given):
    table, _, labels = given
    planted, bad = np.array(table), labels == 1
    planted[:, 4] = np.where(bad, 0.3, 0.0)
    scores = np.where(bad, 1.0, 0.0) + 0.01 * np.arange(N)
    rule = GroupRule(0.1, fraction=bad.mean(), min_members=3)
    found = tally(in_blocks(planted), scores, labels, NAMES, H, rule)
    order = found.order()
    assert found.latents[order[0]] == 4
    (first,) = taken_at(in_blocks(planted), found, [order], 0.1, N, H)
    removal = filter_groups(first, len(order), scores, rule)
    assert removal.taken == 1
    np.testing.assert_array_equal(removal.decision.keep, ~bad)


def test_bad_input(given):
    table, scores, labels = given
    with pytest.raises(ConfigError, match=r"no latent is above groups\.threshold=99 .*highest activation is"):
        tally(in_blocks(table), scores, labels, NAMES, H, GroupRule(99.0))
    with pytest.raises(ConfigError, match="no group has at least 59 members"):
        tally(in_blocks(table), scores, labels, NAMES, H, GroupRule(min_members=59))
    rule = GroupRule(fraction=0.95)
    found = tally(in_blocks(table), scores, labels, NAMES, H, rule)
    (first,) = taken_at(in_blocks(table), found, [found.order()], 0.1, N, H)
    with pytest.raises(ConfigError, match=r"less than groups\.fraction=0\.95"):
        filter_groups(first, len(found.latents), scores, rule)
    everywhere = np.ones((N, 1))
    found = tally(in_blocks(everywhere), scores, labels, NAMES, 1, GroupRule())
    (first,) = taken_at(in_blocks(everywhere), found, [found.order()], 0.1, N, 1)
    with pytest.raises(ConfigError, match="leaves none of 58 scored rows"):
        filter_groups(first, 1, scores, GroupRule())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": -1.0}, "threshold is -1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"aggregate": "median"}, "aggregate is 'median'"),
        ({"mode": "remove_all"}, "mode is 'remove_all'"),
        ({"fraction": 1.0}, "fraction is 1"),
        ({"min_members": 0}, "min_members is 0"),
        ({"max_share": 0.0}, "max_share is 0"),
    ],
)
def test_rules_that_make_no_sense(change, said):
    with pytest.raises(ConfigError, match=said):
        GroupRule(**change)
