"""Sums of latent influence: by latent, by token, by row, and over rows (METHODS §5).

In: RowLatents. Out: small arrays, float64; by latent sparse, a latent that is nowhere active being left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32
from numpy.typing import NDArray

from curate.scoring.latent.base import RowLatents

Latents = Int32[NDArray[np.int32], " m"]
Values = Float[NDArray[np.float64], "q m"]


def per_latent(row: RowLatents) -> tuple[Latents, Values]:
    """(latents that are active somewhere in the row, ascending [m]; Σ over tokens of their influence [q, m])."""
    active = row.activations > 0
    latents, where = np.unique(row.indices[active], return_inverse=True)
    return latents, _sums(row.influence[:, active], where, len(latents))


def per_token(row: RowLatents) -> Float[NDArray[np.float64], "q t"]:
    """Σ over a token's latents."""
    return row.influence.sum(-1, dtype=np.float64)


def per_example(row: RowLatents) -> Float[NDArray[np.float64], " q"]:
    """Σ over tokens and latents: the row's score, to first order what its latents being active gives (eq. 15)."""
    return row.influence.sum((1, 2), dtype=np.float64)


def importance(rows: Sequence[RowLatents]) -> tuple[Latents, Values]:
    """(latents that are active somewhere [m], mean over all rows of their influence [q, m]): the paper's s_k, a row in
    which a latent is not active counting as 0.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("the importance of latents is a mean over rows, and there is none")
    found = [per_latent(row) for row in rows]
    latents, where = np.unique(np.concatenate([latents for latents, _ in found]), return_inverse=True)
    values = np.concatenate([values for _, values in found], axis=1)
    return latents.astype(np.int32), _sums(values, where, len(latents)) / len(rows)


def _sums(values: NDArray[np.floating], where: NDArray[np.int64], m: int) -> Values:
    out = np.zeros((values.shape[0], m))
    for q, part in enumerate(values):
        out[q] = np.bincount(where, weights=part, minlength=m)
    return out
