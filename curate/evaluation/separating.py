"""Latents that separate two sets of rows: how much more (or less) each fires on the one than on the other.

In: sparse activations of rows in blocks, and which of the rows are positive, which negative. Out: for every latent its
AUC with a p-value that is corrected for the number of latents, its standardised difference, and how often it fires in
each set. Knows no model, no SAE and no files. Nothing of the size [rows, latents] is held.

AUC is the chance that a positive row has a higher activation than a negative one, ties counting half (the Mann–Whitney
statistic over the product of the sets' sizes); rows on which a latent does not fire are ties at zero. The p-value is
the two-sided normal approximation with correction for ties, and `q` Benjamini and Hochberg's adjustment: among the
latents with q ≤ 0.05, about 5 % are there by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control, norm, rankdata

from curate.concepts.latent_rows import Blocks, sums
from curate.errors import ConfigError

Direction = Literal["positive", "negative", "both"]
OTHER, POSITIVE, NEGATIVE = -1, 0, 1
HELD = 50_000_000  # activations in memory at a time


@dataclass(frozen=True, eq=False)
class Separation:
    """One entry a latent, [h]. Latents that fire on fewer than `min_rows` rows are not tested: auc, p and q are NaN.

    positives, negatives: rows of the two sets. rate_*: share of a set's rows on which it fires. mean_*: mean
    activation over all rows of a set. difference: (mean_positive − mean_negative) / pooled standard deviation (Cohen's
    d). precision: share of positive rows among those on which it fires.
    """

    positives: int
    negatives: int
    auc: Float[np.ndarray, " h"]
    p: Float[np.ndarray, " h"]
    q: Float[np.ndarray, " h"]
    difference: Float[np.ndarray, " h"]
    rate_positive: Float[np.ndarray, " h"]
    rate_negative: Float[np.ndarray, " h"]
    mean_positive: Float[np.ndarray, " h"]
    mean_negative: Float[np.ndarray, " h"]
    precision: Float[np.ndarray, " h"]

    @property
    def tested(self) -> Bool[np.ndarray, " h"]:
        """Which latents were tested."""
        return np.isfinite(self.auc)

    def order(self, direction: Direction = "positive") -> Int[np.ndarray, " m"]:
        """Tested latents, those that separate best first: by AUC, from 1 down ("positive": those above 0.5), from 0 up
        ("negative"), or by its distance from 0.5. Ties by standardised difference, then by number."""
        away = self.auc - 0.5
        away = {"positive": away, "negative": -away, "both": np.abs(away)}[direction]
        size = (
            np.abs(self.difference) if direction == "both" else self.difference * (-1 if direction == "negative" else 1)
        )
        order = np.lexsort((np.arange(len(away)), -np.nan_to_num(size), -np.where(self.tested, away, -np.inf)))
        return order[(self.tested & (away > 0))[order]]


def separate(
    blocks: Blocks, classes: Int[np.ndarray, " rows"], h: int, min_rows: int = 3, held: int = HELD
) -> Separation:
    """
    Args:
        classes: of each row of the corpus: POSITIVE, NEGATIVE, or OTHER for rows that do not count.
        min_rows: latents that fire on fewer rows of the two sets together are not tested (nor corrected for).
        held: activations in memory at a time; the blocks are read once more for each so many.

    Raises:
        ConfigError: one of the sets is empty, or no latent fires on `min_rows` rows.
    """
    found = sums(blocks, classes, ("positive", "negative"), h)
    n1, n0 = (int(n) for n in found.rows)
    if not n1 or not n0:
        raise ConfigError(
            f"there are {n1} positive and {n0} negative rows with latents; two sets are needed to tell apart"
        )
    fired = found.fired.sum(0)
    tested = np.flatnonzero(fired >= max(1, min_rows))
    if not tested.size:
        most = int(fired.max(initial=0))
        raise ConfigError(
            f"no latent fires on {min_rows} of the {n1 + n0} rows (the most that one fires on: {most}), so none can be "
            f"tested. Is this the SAE of this model and layer? Else lower latents.min_rows."
        )
    auc, p, q = (np.full(h, np.nan) for _ in range(3))
    for chosen in _chunks(tested, fired[tested], held):
        for j, of, a in _columns(blocks, classes, chosen, h):
            auc[j], p[j] = _mann_whitney(a[of == POSITIVE], a[of == NEGATIVE], n1, n0)
    q[tested] = false_discovery_control(p[tested])
    mean = found.total / np.array([[n1], [n0]])
    spread = np.maximum(found.squares - np.array([[n1], [n0]]) * mean**2, 0.0).sum(0) / max(n1 + n0 - 2, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.where(spread > 0, (mean[0] - mean[1]) / np.sqrt(spread), 0.0)
        precision = found.fired[0] / fired
    rate = found.fired / np.array([[n1], [n0]])
    return Separation(n1, n0, auc, p, q, difference, rate[0], rate[1], mean[0], mean[1], precision)


def _chunks(latents: np.ndarray, sizes: np.ndarray, held: int) -> Iterator[np.ndarray]:
    """Runs of latents with about `held` activations together, at least one latent each."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // held)) + 1
    yield from np.split(latents, cuts)


def _columns(
    blocks: Blocks, classes: np.ndarray, chosen: np.ndarray, h: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(latent, class of each entry, activation) of each chosen latent that fires on rows of the two sets."""
    wanted = np.zeros(h, bool)
    wanted[chosen] = True
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for block in blocks():
        of = np.repeat(classes[block.rows], np.diff(block.values.indptr))
        kept = wanted[block.values.indices] & (of != OTHER)
        parts.append((block.values.indices[kept], of[kept].astype(np.int8), block.values.data[kept]))
    latents, of, a = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(latents, kind="stable")
    latents, of, a = latents[order], of[order], a[order]
    edges = np.flatnonzero(np.diff(latents)) + 1
    for column in np.split(np.arange(len(latents)), edges):
        yield int(latents[column[0]]), of[column], a[column]


def _mann_whitney(one: np.ndarray, zero: np.ndarray, n1: int, n0: int) -> tuple[float, float]:
    """AUC and p of activations `one` and `zero`, all above 0, where the other rows of the n1 and n0 have 0."""
    m1, m0, n = len(one), len(zero), n1 + n0
    a = np.concatenate([one, zero])
    ranks = rankdata(a)
    u = ranks[:m1].sum() - m1 * (m1 + 1) / 2  # among the rows on which it fires
    u += m1 * (n0 - m0) + 0.5 * (n1 - m1) * (n0 - m0)
    ties = np.unique(a, return_counts=True)[1].astype(np.float64)
    ties = np.append(ties, n - m1 - m0)
    variance = n1 * n0 / 12 * (n + 1 - float((ties**3 - ties).sum()) / (n * (n - 1)))
    if variance <= 0:  # one activation on all rows
        return 0.5, 1.0
    z = (u - n1 * n0 / 2) / np.sqrt(variance)
    return float(u / (n1 * n0)), float(2 * norm.sf(abs(z)))
