"""Test vectors side by side: their numbers in the right places, and no more copies than there must be."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.curvature.blocks import Dense
from curate.curvature.test_vector import low_rank, restrict
from curate.errors import CurvatureError
from curate.models.tracked import LayerChoice
from curate.scoring.directional import contraction
from curate.scoring.directional.make import BACKENDS, make_backend
from curate.scoring.directional.stacked import Stacked
from tests.scoring.directional.oracle import random_vector
from tests.scoring.rows import make_examples, render
from tests.tiny import tiny_model

ROWS = render(make_examples())


def two(ranks):
    """One test vector of two queries, one of one query that lacks the last blocks."""
    model = tiny_model("llama")
    first = random_vector(model, ["a", "b"])
    second = random_vector(model, ["c"], LayerChoice(kind="all", last=2), seed=1)
    made = [v if rank is None else low_rank(v, rank)[0] for v, rank in zip((first, second), ranks, strict=True)]
    return model, made


@pytest.mark.parametrize("ranks", [(None, None), (3, 2), (None, 9), (2, None)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_score_as_each_alone(backend, ranks):
    model, vectors = two(ranks)
    made = make_backend(backend, model, vectors)
    assert made.names == ("a", "b", "c")
    assert made.layers == vectors[0].layers
    assert not Stacked(vectors).one(made.layers[-1].name, 2).any()
    alone = np.concatenate([make_backend(backend, model, v).run(ROWS).scores for v in vectors], axis=1)
    error = np.abs(made.run(ROWS).scores - alone).max(0) / np.abs(alone).max(0)
    assert (error < 1e-5).all()


@pytest.mark.parametrize("ranks", [(None, None), (3, 2), (None, 9)])
def test_norms(ranks):
    _, vectors = two(ranks)
    torch.testing.assert_close(Stacked(vectors).norm(), torch.cat([v.norm() for v in vectors]))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_one_method_in_float32_on_the_cpu_is_not_copied(names, rank):
    model = tiny_model("llama")
    vector = random_vector(model, names, rank=rank)
    made = make_backend("contraction", model, vector)
    for name, block in vector.blocks.items():
        own = (block.values,) if isinstance(block, Dense) else (block.u, block.v)
        assert [part.data_ptr() for part in made.directions[name]] == [part.data_ptr() for part in own]


@pytest.mark.parametrize("methods", [1, 2])
@pytest.mark.parametrize("backend", ["contraction", "forward"])
def test_what_was_copied_is_let_go(backend, methods):
    model = tiny_model("llama").to(torch.bfloat16)
    vectors = [random_vector(model, ["a"], seed=seed) for seed in range(methods)]
    host = [weakref.ref(block.values) for vector in vectors for block in vector.blocks.values()]
    made = make_backend(backend, model, vectors)
    del vectors
    gc.collect()
    assert host
    assert not [ref for ref in host if ref() is not None]
    assert np.isfinite(made.run(ROWS).scores).all()


def test_many_dense_queries_in_half_precision_are_not_copied_in_float32(monkeypatch):
    model = tiny_model("llama").to(torch.bfloat16)
    vector = random_vector(model, [str(i) for i in range(24)], LayerChoice(kind="mlp"))
    made = make_backend("contraction", model, vector)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in [out] if isinstance(x, torch.Tensor) and x.dtype == torch.float32)
            return out

    block = made.directions[vector.layers[0].name]
    a, delta = (torch.randn((2, 5, n)).bfloat16() for n in (vector.layers[0].width, vector.layers[0].out))
    with Watch():
        found = contraction.contract(block, a, delta)
    assert max(sizes) < block[0].numel() / 2
    expected = torch.einsum("bto,qoi,bti->bq", delta.double(), block[0].double(), a.double())
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.999


def test_layers_that_only_some_reach_and_layers_that_none_does():
    model = tiny_model("llama")
    vector = random_vector(model, ["a"])
    nothing = replace(vector, blocks={n: Dense(torch.zeros_like(b.values)) for n, b in vector.blocks.items()})
    low = restrict(vector, lambda layer: layer.block == 0)
    assert Stacked([low, nothing]).layers == low.layers
    assert Stacked([nothing]).layers == vector.layers
    with pytest.raises(CurvatureError, match="no test vector"):
        Stacked([])
