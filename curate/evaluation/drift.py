"""Drift of a score: how far the values of new rows lie from those of a baseline.

In: two samples of one score. Out: sizes, mean, quantiles, share above a threshold, population stability index (PSI)
and the two-sample Kolmogorov–Smirnov test. Knows no files, no concepts and no rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SMOOTHING = 0.5  # rows added to every bin of both samples, so that an empty bin has a logarithm
_EXACT = 1000  # rows up to which the distribution of the KS statistic is computed exactly


@dataclass(frozen=True)
class Drift:
    """New rows against a baseline. What needs a baseline is None where there is none, or one of the two is empty.

    n, baseline_n: rows with a score. quantiles: at QUANTILES. share_above: of the new rows, those with a score above
    `threshold`; baseline_share_above the same of the baseline. mean_shift: (mean − baseline mean) / baseline standard
    deviation. psi_noise: what PSI stays below with probability 0.95 where nothing has drifted, for samples of these
    sizes. ks, ks_p: statistic and p-value (two-sided).
    """

    n: int
    baseline_n: int
    mean: float | None
    std: float | None
    quantiles: tuple[float | None, ...]
    threshold: float | None
    share_above: float | None
    baseline_share_above: float | None
    mean_shift: float | None
    psi: float | None
    psi_noise: float | None
    ks: float | None
    ks_p: float | None


def edges(baseline: Float[np.ndarray, " m"], bins: int = 10) -> Float[np.ndarray, " e"]:
    """Where the bins of PSI meet: the baseline's inner quantiles, each once. The outer bins are open.

    A bin holds its lower edge. Where many rows of the baseline have its largest value, what lies above that is a bin of
    its own: else a score of few values could rise and no bin would tell.
    """
    inner = np.unique(np.quantile(baseline, np.arange(1, bins) / bins))
    largest = baseline.max()
    return np.append(inner, np.nextafter(largest, np.inf)) if inner[-1] == largest else inner


def counts(values: Float[np.ndarray, " n"], at: Float[np.ndarray, " e"]) -> np.ndarray:
    """Values in each of the len(at) + 1 bins."""
    return np.bincount(np.searchsorted(at, values, side="right"), minlength=len(at) + 1)


def psi(new: np.ndarray, baseline: np.ndarray) -> float:
    """Population stability index of two counts over the same bins: Σ (p − q) ln(p/q).

    p and q are shares of the new rows and of the baseline, each of counts to which half a row a bin is added
    (p = (c + ½) / (n + B/2)).
    """
    p = (new + _SMOOTHING) / (new.sum() + _SMOOTHING * len(new))
    q = (baseline + _SMOOTHING) / (baseline.sum() + _SMOOTHING * len(baseline))
    return float(((p - q) * np.log(p / q)).sum())


def psi_noise(n: int, m: int, bins: int, level: float = 0.95) -> float:
    """The `level` quantile of PSI between samples of n and m rows of one distribution: nearly (1/n + 1/m) χ²(B − 1)."""
    return float(stats.chi2.ppf(level, max(1, bins - 1)) * (1 / n + 1 / m))


def compare(
    values: Float[np.ndarray, " n"],
    baseline: Float[np.ndarray, " m"] | None,
    threshold: float | None,
    bins: int = 10,
) -> Drift:
    """The drift of `values` (NaN: no score) against `baseline`."""
    x = values[np.isfinite(values)]
    base = baseline[np.isfinite(baseline)] if baseline is not None else np.empty(0)
    n, m = len(x), len(base)
    known: dict[str, float | None] = dict.fromkeys(("mean_shift", "psi", "psi_noise", "ks", "ks_p"))
    if n and m:
        at = edges(base, bins)
        spread = float(base.std())
        known["mean_shift"] = float(x.mean() - base.mean()) / spread if spread > 0 else None
        known["psi"] = psi(counts(x, at), counts(base, at))
        known["psi_noise"] = psi_noise(n, m, len(at) + 1)
        test = stats.ks_2samp(x, base, method="exact" if max(n, m) <= _EXACT else "asymp")
        known["ks"], known["ks_p"] = float(test.statistic), float(test.pvalue)
    return Drift(
        n=n,
        baseline_n=m,
        mean=float(x.mean()) if n else None,
        std=float(x.std()) if n else None,
        quantiles=tuple(float(q) for q in np.quantile(x, QUANTILES)) if n else (None,) * len(QUANTILES),
        threshold=threshold,
        share_above=float((x > threshold).mean()) if n and threshold is not None else None,
        baseline_share_above=float((base > threshold).mean()) if m and threshold is not None else None,
        **known,
    )
