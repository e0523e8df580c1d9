"""Cosines and gradient norms against per-example gradients by autograd in float64; candidates by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.concepts.sae import SAE
from curate.corpus.render import Rendered
from curate.curvature.blocks import Dense
from curate.curvature.test_vector import TestVector, low_rank
from curate.errors import ConfigError, CurvatureError
from curate.models.splice import spliced
from curate.models.tracked import LayerChoice, tracked_layers
from curate.scoring.directional import cosine
from curate.scoring.directional.cosine import Cosine
from curate.scoring.gradient_cosine import GradientCosine, candidates, gradient_norms
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass
from tests.curvature.oracle import count, make_rows, response_loss, weight_gradients
from tests.scoring.directional.oracle import random_vector
from tests.scoring.rows import make_examples, render
from tests.tiny import tiny_model

ROWS = make_rows(9, longest=40)
CHOICES = [LayerChoice("attention"), LayerChoice("all", first=1), LayerChoice("mlp", stride=2)]


def gradients(model, layers, rows) -> torch.Tensor:
    """[rows, weights] of each row's mean loss."""
    out = []
    for row in rows:
        found = weight_gradients(model, layers, row.input_ids, response_loss(row))
        out.append(torch.cat([found[layer.name].flatten() for layer in layers]) / count(row))
    return torch.stack(out)


def flat(vector: TestVector) -> torch.Tensor:
    return torch.cat([vector.blocks[layer.name].dense().flatten(1) for layer in vector.layers], dim=1).double()


@pytest.mark.parametrize("way", ["gram", "matrix"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.kind)
def test_norms_and_cosines_are_those_of_autograds_gradients(kind, choice, way, monkeypatch):
    model = tiny_model(kind).double()
    layers, _ = tracked_layers(model, choice)
    if way == "matrix":
        monkeypatch.setattr(cosine, "_gram_is_cheaper", lambda tokens, layer: False)
        monkeypatch.setattr(cosine, "_PRODUCTS", 3 * 32 * 32)  # some rows at once
    else:
        monkeypatch.setattr(cosine, "_gram_is_cheaper", lambda tokens, layer: True)
    each = gradients(model, layers, ROWS)
    exact = 1e-9 if kind in ("gpt2", "opt") else 1e-6  # the others' norms work in float32
    for reduction, factor in (("mean", 1.0), ("sum", np.array([count(r) for r in ROWS]))):
        found = gradient_norms(model, layers, ROWS, 100, 3, reduction)
        np.testing.assert_allclose(found, each.norm(dim=1).numpy() * factor, rtol=exact)
    vector = random_vector(model, ["f", "g"], choice)
    expected = torch.cosine_similarity(-each[:, None], flat(vector)[None], dim=-1)
    np.testing.assert_allclose(Cosine(model, vector, 100, 3).run(ROWS).scores, expected, atol=exact)


def test_both_ways_are_taken_where_each_is_cheaper():
    model = tiny_model("llama")
    layers, _ = tracked_layers(model, LayerChoice("all"))
    (wide,) = [x for x in layers if x.block == 0 and x.name.endswith("gate_proj")]  # 64 x 32
    assert cosine._gram_is_cheaper(21, wide)  # 21 · 96 < 64 · 32
    assert not cosine._gram_is_cheaper(22, wide)


def test_a_cosine_of_a_gradient_with_itself_is_one():
    model = tiny_model("llama")
    layers, _ = tracked_layers(model, LayerChoice("all"))
    each = gradients(model.double(), layers, ROWS[:3]).float()
    parts = (-each).split([layer.size for layer in layers], dim=1)
    blocks = {x.name: Dense(p.reshape(3, x.out, x.width)) for x, p in zip(layers, parts, strict=True)}
    vector = TestVector(("a", "b", "c"), tuple(layers), blocks)
    found = Cosine(tiny_model("llama"), vector).run(ROWS[:3]).scores
    np.testing.assert_allclose(found.diagonal(), 1.0, atol=1e-6)
    assert (found <= 1 + 1e-6).all()
    thin, _ = low_rank(vector, 3)  # of a thin vector it is the cosine with that one
    expected = torch.cosine_similarity(-each[:, None].double(), flat(thin)[None], dim=-1)
    np.testing.assert_allclose(Cosine(tiny_model("llama"), thin).run(ROWS[:3]).scores, expected, atol=1e-5)


def test_it_does_not_depend_on_batches_or_the_reduction():
    model = tiny_model("qwen2")
    vector = random_vector(model, ["f", "g"])
    whole = Cosine(model, vector, 10**6, 3).run(ROWS).scores
    for budget in (1, 60):
        np.testing.assert_allclose(Cosine(model, vector, budget, 3).run(ROWS).scores, whole, atol=1e-6)
    np.testing.assert_allclose(Cosine(model, vector, 60, 3, "sum").run(ROWS).scores, whole, atol=1e-6)


def test_rows_without_a_gradient_have_no_cosine():
    model = tiny_model("llama")
    layers, _ = tracked_layers(model, LayerChoice("all"))
    silent = Rendered([4, 5, 6], 3, 3, 3)
    rows = [ROWS[0], silent, ROWS[1]]
    found = Cosine(model, random_vector(model)).run(rows).scores[:, 0]
    assert np.isnan(found).tolist() == [False, True, False]
    assert np.isnan(gradient_norms(model, layers, rows)).tolist() == [False, True, False]
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert np.isnan(Cosine(model, random_vector(model)).run(ROWS).scores).all()
    assert (gradient_norms(model, layers, ROWS) == 0).all()


def test_within_a_splice_it_is_that_of_the_spliced_model():
    model = tiny_model("gpt2").double()
    maker = torch.Generator().manual_seed(0)
    w = [
        torch.randn(shape, generator=maker, dtype=torch.float64) for shape in ((64, 32), (64,), (64, 32), (32,), (32,))
    ]
    sae = SAE(*w, "topk", 1, "random", k=8)
    choice = LayerChoice("all", first=1)
    vector = random_vector(model, ["f"], choice)
    with spliced(model, sae):
        each = gradients(model, vector.layers, ROWS)
        found = Cosine(model, vector).run(ROWS).scores[:, 0]
        norms = gradient_norms(model, vector.layers, ROWS)
    np.testing.assert_allclose(found, torch.cosine_similarity(-each, flat(vector)), atol=1e-9)
    np.testing.assert_allclose(norms, each.norm(dim=1), rtol=1e-9)
    assert np.abs(Cosine(model, vector).run(ROWS).scores[:, 0] - found).max() > 1e-3


def test_as_a_scorer():
    model, examples = tiny_model("llama"), make_examples()
    vectors = {name: random_vector(model, ["loss"]) for name in ("gradient_cosine", "gradient_product")}
    scorers = make_scorers({"gradient_cosine": {}, "gradient_product": {}}, test_vectors=vectors)
    found = SharedPass(model, scorers).run(examples, render(examples)).columns
    expected = Cosine(model, vectors["gradient_cosine"]).run(render(examples)).scores[:, 0]
    np.testing.assert_allclose(found["gradient_cosine.loss"], expected, atol=1e-6)
    layers = vectors["gradient_cosine"].layers
    norms = gradient_norms(model, layers, render(examples)) * float(vectors["gradient_cosine"].norm())
    np.testing.assert_allclose(found["gradient_product.loss"] / norms, expected, atol=1e-5)
    assert scorers[0].fingerprint()["backend"] == "cosine"
    with pytest.raises(ConfigError, match="no option 'backend'"):
        make_scorers({"gradient_cosine": {"backend": "forward"}}, test_vectors=vectors)
    with pytest.raises(ConfigError, match=r"gradient_product\.backend is 'cosine'"):
        make_scorers({"gradient_product": {"backend": "cosine"}}, test_vectors=vectors)
    with pytest.raises(ConfigError, match="needs a test vector"):
        GradientCosine({})


COSINES = np.array([[0.9, 0.1], [np.nan, np.nan], [0.5, 0.8], [0.9, -0.2], [-0.3, 0.8]])


@pytest.mark.parametrize(
    ("keep", "at_least", "expected"),
    [(None, None, ([0, 3, 2, 4], [2, 4, 0, 3])), (2, None, ([0, 3], [2, 4])), (0.4, None, ([0, 3], [2, 4])),
     (0.01, None, ([0], [2])), (3, 0.2, ([0, 3, 2], [2, 4])), (99, None, ([0, 3, 2, 4], [2, 4, 0, 3]))],
)  # fmt: skip
def test_candidates(keep, at_least, expected):
    found = candidates(COSINES, keep, at_least)
    assert [list(f) for f in found] == [list(e) for e in expected]


def test_a_pre_filter_that_leaves_nothing_is_an_error():
    with pytest.raises(
        CurvatureError, match=r"no candidate for item 1: of 5 rows 4 have a cosine, the largest is 0\.8"
    ):
        candidates(COSINES, 2, at_least=0.85)
    with pytest.raises(CurvatureError, match="no candidate for item 0: of 2 rows 0 have a cosine"):
        candidates(np.full((2, 1), np.nan), 0.1)
    for keep in (0, -1, 1.5, float("nan")):
        with pytest.raises(CurvatureError, match="neither a share between 0 and 1 nor a whole number"):
            candidates(COSINES, keep)
