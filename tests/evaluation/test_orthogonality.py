"""Orthogonality statistics against numpy's correlation matrix, known matrices, and the memory of a wide space."""

from __future__ import annotations

import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import torch

from curate.concepts.sae import SAE, dense
from curate.corpus.render import Rendered
from curate.errors import ConfigError
from curate.evaluation.orthogonality import Gram, spaces
from tests.tiny import tiny_model


def plainly(x: np.ndarray) -> dict[str, float]:
    """The definitions, from the whole matrix at once."""
    live = x[:, np.ptp(x, axis=0) > 0]
    z = live - live.mean(0)
    z = z / np.linalg.norm(z, axis=0)
    rho = (z.T @ z)[np.triu_indices(live.shape[1], 1)]
    return {
        "rows": len(x),
        "features": live.shape[1],
        "constant": x.shape[1] - live.shape[1],
        "mean_abs": np.abs(rho).mean(),
        "mean_square": (rho**2).mean(),
        "frobenius": np.sqrt((rho**2).mean()),
        "stable_rank": np.linalg.norm(z) ** 2 / np.linalg.norm(z, 2) ** 2,
        "near_share": (np.abs(rho) < 0.1).mean(),
    }


def same(got, want: dict[str, float], tolerance: float = 1e-9) -> None:
    for name, value in want.items():
        assert getattr(got, name) == pytest.approx(value, rel=tolerance, abs=tolerance), name


def sparse_of(x: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unused slots have value 0 and index 0, as an SAE's."""
    values, indices = np.zeros((len(x), k)), np.zeros((len(x), k), dtype=np.int64)
    for i, row in enumerate(x):
        at = np.flatnonzero(row)
        values[i, : len(at)], indices[i, : len(at)] = row[at], at
    return torch.from_numpy(values), torch.from_numpy(indices)


@pytest.mark.parametrize("block", [1, 7, 30, 1024])
@pytest.mark.parametrize("features", [30, 90])
def test_dense_rows_in_batches_are_numpys(block, features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(70, features)) @ rng.normal(size=(features, features)) + rng.normal(size=features) * 1e4
    x[:, 3], x[:, 11] = 5.0, 0.0
    gram = Gram(features, block)
    for part in np.array_split(x, [9, 9, 40]):
        gram.add(part)
    same(gram.result("x"), plainly(x), 1e-7)


@pytest.mark.parametrize("block", [5, 1024])
def test_sparse_rows_are_the_dense_ones(block):
    rng = np.random.default_rng(1)
    x = np.where(rng.random((200, 80)) < 0.08, rng.gamma(2.0, size=(200, 80)), 0.0)
    x[:, 20:25] = 0.0
    gram, whole = Gram(80, block), Gram(80, block)
    for part in np.array_split(x, 4):
        gram.add_sparse(*sparse_of(part, 20))
    whole.add(x)
    same(gram.result("r"), plainly(x))
    same(gram.result("r"), {k: v for k, v in asdict(whole.result("r")).items() if k != "space"})


def test_rows_may_follow_a_result():
    x = np.random.default_rng(2).normal(size=(50, 12))
    gram = Gram(12)
    gram.add_sparse(*sparse_of(x[:20], 12))
    same(gram.result("r"), plainly(x[:20]))
    gram.add_sparse(*sparse_of(x[20:], 12))
    same(gram.result("r"), plainly(x))


def test_known_matrices():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 41)) - 0.0)
    q -= q.mean(0)
    q, _ = np.linalg.qr(q)  # columns are orthonormal and sum to zero
    gram = Gram(41)
    gram.add(q)
    same(
        gram.result("orthonormal"),
        {"mean_abs": 0, "mean_square": 0, "frobenius": 0, "stable_rank": 41, "near_share": 1, "constant": 0},
        1e-9,
    )
    one = Gram(41)
    one.add(np.outer(np.arange(9.0), np.linspace(-2, 2, 42)[1:]))  # rank one; no column is zero
    same(one.result("rank one"), {"mean_abs": 1, "frobenius": 1, "stable_rank": 1, "near_share": 0}, 1e-9)
    two = Gram(2)
    two.add(np.array([[1.0, 1.0], [2.0, -1.0], [3.0, 4.0]]))
    rho = np.corrcoef([1, 2, 3], [1, -1, 4])[0, 1]
    same(two.result("two"), {"mean_abs": abs(rho), "stable_rank": 2 / (1 + abs(rho))})


def test_a_wide_space_stays_below_two_gigabytes():
    features = 4096  # a sixteenth of 16,384's matrix
    rng = np.random.default_rng(0)
    tracemalloc.start()
    gram = Gram(features, 512)
    for _ in range(3):
        values = torch.from_numpy(rng.gamma(2.0, size=(300, 32)))
        gram.add_sparse(values, torch.from_numpy(rng.integers(0, features, (300, 32))))
    found = gram.result("r")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**31 / 16
    assert found.features + found.constant == features
    assert found.constant < 10


def test_spaces_are_those_of_the_models_own_states():
    model = tiny_model()
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(96, 32, generator=rng)
    sae = SAE(w, torch.zeros(96), w, torch.zeros(32), torch.zeros(32), "topk", 2, "s", 5)
    rows = [
        Rendered(np.random.default_rng(i).integers(4, 300, n).tolist(), n - 2, n - 1, n)
        for i, n in enumerate((9, 30, 17))
    ]

    def states(layer: int, skip: int) -> list[np.ndarray]:
        return [
            model(input_ids=torch.tensor([r.input_ids]), output_hidden_states=True)
            .hidden_states[layer][0, skip:]
            .numpy()
            for r in rows
        ]

    for pool, skip in (("tokens", 0), ("tokens", 1), ("mean", 0), ("mean", 2)):
        got = spaces(model, sae, rows, token_budget=40, pool=pool, skip_first=skip)
        assert [g.space for g in got] == ["text embeddings", "layer 2", "SAE latents"]
        text, before = states(0, skip), states(2, skip)
        latent = [dense(sae, torch.from_numpy(x)).numpy() for x in before]
        for found, parts in zip(got, (text, before, latent), strict=True):
            whole = np.stack([p.mean(0) for p in parts]) if pool == "mean" else np.concatenate(parts)
            same(found, plainly(whole.astype(np.float64)), 1e-4)


def test_what_cannot_be_correlated_is_refused():
    one, flat = Gram(3), Gram(3)
    one.add(np.array([[1.0, 2.0, 3.0]]))
    flat.add(np.ones((5, 3)))
    with pytest.raises(ConfigError, match="1 rows"):
        one.result("x")
    with pytest.raises(ConfigError, match="0 features that vary"):
        flat.result("x")
    with pytest.raises(ConfigError, match="not finite"):
        flat.add(np.array([[1.0, np.inf, 0.0]]))
    with pytest.raises(ConfigError, match="not finite"):
        Gram(3).add_sparse(torch.tensor([[torch.nan]]), torch.tensor([[1]]))
    with pytest.raises(ConfigError, match="rows of 4 features"):
        Gram(3).add(np.ones((2, 4)))
    with pytest.raises(ConfigError, match="rows of 8 features"):
        Gram(3).add_sparse(torch.ones(1, 1), torch.tensor([[7]]))
    with pytest.raises(ConfigError, match="sparse and dense"):
        flat.add_sparse(torch.ones(1, 1), torch.tensor([[1]]))
    with pytest.raises(ConfigError, match="pool"):
        spaces(tiny_model(), None, [], 10, pool="max")
