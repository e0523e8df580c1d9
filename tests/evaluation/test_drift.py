"""PSI and KS against their definitions written out, and against what chance alone gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from curate.evaluation.drift import QUANTILES, compare, counts, edges, psi, psi_noise


def test_psi_of_counts_is_the_sum_that_defines_it():
    new, base = np.array([5, 0, 45]), np.array([20, 30, 50])
    p = [(c + 0.5) / 51.5 for c in (5, 0, 45)]
    q = [(c + 0.5) / 101.5 for c in (20, 30, 50)]
    expected = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert psi(new, base) == pytest.approx(expected, rel=1e-12)
    assert psi(base, base) == 0
    assert psi(new, base) == pytest.approx(psi(new, base))
    # The two samples have equal parts in it, but for the half rows that are added.
    assert psi(new * 1000, base * 1000) == pytest.approx(psi(base * 1000, new * 1000), rel=1e-12)


def test_bins_are_quantiles_of_the_baseline():
    base = np.random.default_rng(0).normal(size=1000)
    at = edges(base)
    assert len(at) == 9
    assert counts(base, at).tolist() == [100] * 10
    assert counts(np.array([-99.0, 99.0, at[0]]), at).tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("off", [-1, 1])
def test_a_score_of_one_value_that_moves_is_seen(off):
    base = np.full(50, 3.0)
    assert compare(base, base, None).psi == 0
    assert compare(base + off, base, None).psi > 1


def test_a_score_of_few_values_that_moves_beyond_them_is_seen():
    base = np.repeat([0.0, 1.0], [50, 50])
    assert compare(np.repeat([0.0, 2.0], [50, 50]), base, None).psi > 0.5


def test_ks_is_the_largest_distance_of_the_distributions():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=37), rng.normal(0.7, 1, size=53)
    d = compare(a, b, 0.5)
    grid = np.concatenate([a, b])
    assert d.ks == pytest.approx(max(abs((a <= x).mean() - (b <= x).mean()) for x in grid), abs=1e-12)
    lam = d.ks * math.sqrt(37 * 53 / 90)
    rough = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * lam * lam) for k in range(1, 100))
    assert d.ks_p == pytest.approx(rough, abs=0.03)  # the asymptotic formula
    assert (d.n, d.baseline_n) == (37, 53)
    assert d.share_above == pytest.approx((a > 0.5).mean())
    assert d.baseline_share_above == pytest.approx((b > 0.5).mean())
    assert d.mean_shift == pytest.approx((a.mean() - b.mean()) / b.std())
    assert d.quantiles == pytest.approx(tuple(np.quantile(a, QUANTILES)))


@pytest.mark.parametrize(("n", "m"), [(200, 200), (100, 2000), (3000, 500)])
def test_noise_is_what_chance_alone_gives(n, m):
    """Simulated: of samples of one distribution, about one in twenty has a larger PSI."""
    rng = np.random.default_rng(n)
    found = []
    for _ in range(400):
        base, new = rng.normal(size=m), rng.normal(size=n)
        at = edges(base)
        found.append(psi(counts(new, at), counts(base, at)))
    above = np.mean(np.array(found) > psi_noise(n, m, 10))
    assert 0.015 < above < 0.11
    assert np.mean(found) == pytest.approx(9 * (1 / n + 1 / m), rel=0.2)


def test_large_samples_have_the_asymptotic_p():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=3000), rng.normal(0.05, 1, size=4000)
    assert compare(a, b, None).ks_p == pytest.approx(stats.ks_2samp(a, b, method="asymp").pvalue)


def test_rows_without_a_score_count_nowhere():
    x = np.array([1.0, np.nan, 3.0])
    d = compare(x, np.array([np.nan, 2.0]), 2.5)
    assert (d.n, d.baseline_n, d.mean, d.share_above) == (2, 1, 2.0, 0.5)


@pytest.mark.parametrize(("new", "base"), [([], [1.0]), ([1.0], []), ([], []), ([1.0], None)])
def test_without_rows_there_is_no_drift_to_speak_of(new, base):
    d = compare(np.array(new, dtype=float), None if base is None else np.array(base, dtype=float), 0.0)
    assert d.psi is d.ks is d.ks_p is d.mean_shift is None
    assert (d.mean is None) == (not new)
