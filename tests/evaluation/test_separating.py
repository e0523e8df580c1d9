"""Latents that separate two sets, against scipy and scikit-learn on the dense table."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu
from sklearn.metrics import precision_score, roc_auc_score

from curate.errors import ConfigError
from curate.evaluation.separating import NEGATIVE, OTHER, POSITIVE, separate
from tests.concepts.test_latent_rows import dense_rows, in_blocks


@pytest.fixture(scope="module")
def given():
    table = dense_rows(120, 17, 3)
    of = np.random.default_rng(4).integers(-1, 2, len(table))
    table[:, 16] = 0
    table[:2, 16] = 1.0  # fires on two rows only
    return table, of


def test_every_number_is_that_of_the_dense_table(given):
    table, of = given
    found = separate(in_blocks(table), of, 17)
    one, zero = table[of == POSITIVE], table[of == NEGATIVE]
    assert (found.positives, found.negatives) == (len(one), len(zero))
    tested = ((one > 0).sum(0) + (zero > 0).sum(0)) >= 3
    np.testing.assert_array_equal(found.tested, tested)
    assert not tested[16]
    labels = np.repeat([1, 0], [len(one), len(zero)])
    for j in np.flatnonzero(tested):
        values = np.concatenate([one[:, j], zero[:, j]])
        assert found.auc[j] == pytest.approx(roc_auc_score(labels, values))
        p = mannwhitneyu(one[:, j], zero[:, j], method="asymptotic", use_continuity=False).pvalue
        assert found.p[j] == pytest.approx(p, rel=1e-9)
        assert found.precision[j] == pytest.approx(precision_score(labels, values > 0))
        pooled = np.sqrt((one[:, j].var() * len(one) + zero[:, j].var() * len(zero)) / (len(labels) - 2))
        assert found.difference[j] == pytest.approx((one[:, j].mean() - zero[:, j].mean()) / pooled)
    np.testing.assert_allclose(found.q[tested], false_discovery_control(found.p[tested]))
    np.testing.assert_allclose(found.rate_positive, (one > 0).mean(0))
    np.testing.assert_allclose(found.mean_negative, zero.mean(0))
    assert np.isnan(found.q[16])


def test_how_many_are_held_at_a_time_changes_nothing(given):
    table, of = given
    whole = separate(in_blocks(table), of, 17)
    for held in (1, 40, 200):
        few = separate(in_blocks(table, 50), of, 17, held=held)
        for name in ("auc", "p", "q", "difference"):
            np.testing.assert_allclose(getattr(few, name), getattr(whole, name), rtol=1e-12)


def test_orders_by_direction(given):
    table, of = given
    found = separate(in_blocks(table), of, 17)
    up, down, both = (found.order(d) for d in ("positive", "negative", "both"))
    assert (np.diff(found.auc[up]) <= 0).all()
    assert (found.auc[up] > 0.5).all()
    assert (np.diff(found.auc[down]) >= 0).all()
    assert (found.auc[down] < 0.5).all()
    assert sorted(both) == sorted([*up, *down])
    assert (np.diff(np.abs(found.auc[both] - 0.5)) <= 1e-12).all()


def test_a_latent_that_fires_on_the_positive_rows_alone_comes_first(given):
    table, of = given
    planted = np.array(table)
    planted[:, 5] = np.where(of == POSITIVE, 0.2, 0.0)
    found = separate(in_blocks(planted), of, 17)
    assert found.order()[0] == 5
    assert (found.auc[5], found.precision[5], found.rate_negative[5]) == (1.0, 1.0, 0.0)
    assert found.q[5] == np.nanmin(found.q) < 1e-8


def test_noise_is_seldom_called_significant():
    rng = np.random.default_rng(5)
    table = rng.exponential(size=(200, 300)) * (rng.random((200, 300)) < 0.3)
    found = separate(in_blocks(table, 64), rng.integers(0, 2, 200), 300)
    assert (found.p < 0.05).mean() == pytest.approx(0.05, abs=0.04)
    assert (found.q < 0.05).sum() <= 3


def test_a_latent_of_one_value_on_all_rows_tells_nothing():
    found = separate(in_blocks(np.ones((6, 1))), np.array([0, 0, 0, 1, 1, 1]), 1)
    assert (found.auc[0], found.p[0], found.difference[0]) == (0.5, 1.0, 0.0)
    assert not len(found.order("both"))


def test_bad_input(given):
    table, of = given
    with pytest.raises(ConfigError, match="0 negative rows"):
        separate(in_blocks(table), np.where(of == NEGATIVE, OTHER, of), 17)
    with pytest.raises(ConfigError, match=r"no latent fires on 500 of the .* rows"):
        separate(in_blocks(table), of, 17, min_rows=500)
