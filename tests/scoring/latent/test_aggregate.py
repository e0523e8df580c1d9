"""Sums by latent, token and row against sums over the dense array."""

from __future__ import annotations

import numpy as np
import pytest

from curate.scoring.latent.aggregate import importance, per_example, per_latent, per_token
from curate.scoring.latent.base import RowLatents
from tests.scoring.latent.setting import densified

LATENTS = 9


def make_row(seed: int, t: int = 5, k: int = 3, q: int = 2) -> RowLatents:
    maker = np.random.default_rng(seed)
    indices = np.stack([maker.permutation(LATENTS)[:k] for _ in range(t)]).astype(np.int32)
    activations = maker.uniform(size=(t, k)) * (maker.uniform(size=(t, k)) > 0.3)
    indices[activations == 0] = 0
    return RowLatents(indices, activations, maker.normal(size=(q, t, k)) * (activations > 0))


def test_sums_of_a_row():
    row = make_row(0)
    activations, influence = densified(row, LATENTS)
    latents, values = per_latent(row)
    assert latents.dtype == np.int32
    assert latents.tolist() == np.flatnonzero(activations.any(0)).tolist()
    np.testing.assert_allclose(values, influence.sum(1)[:, latents])
    np.testing.assert_allclose(per_token(row), influence.sum(2))
    np.testing.assert_allclose(per_example(row), influence.sum((1, 2)))


def test_importance_is_the_mean_over_rows():
    rows = [make_row(seed, t) for seed, t in ((1, 1), (2, 2), (3, 4))]
    latents, values = importance(rows)
    dense = np.mean([densified(row, LATENTS)[1].sum(1) for row in rows], axis=0)
    fires = np.any([densified(row, LATENTS)[0].any(0) for row in rows], axis=0)
    assert latents.tolist() == np.flatnonzero(fires).tolist()
    assert latents.dtype == np.int32
    np.testing.assert_allclose(values, dense[:, latents])
    with pytest.raises(ValueError, match="there is none"):
        importance([])


def test_a_row_without_latents():
    empty = RowLatents(np.zeros((4, 0), np.int32), np.zeros((4, 0)), np.zeros((2, 4, 0)))
    latents, values = per_latent(empty)
    assert latents.shape == (0,)
    assert values.shape == (2, 0)
    assert per_token(empty).tolist() == [[0.0] * 4] * 2
    assert per_example(empty).tolist() == [0.0, 0.0]
    assert importance([empty])[1].shape == (2, 0)
