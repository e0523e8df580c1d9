"""Gradients item by item: each as its own mean over one query; their mean that of all; items that cannot be used."""

from __future__ import annotations

import pytest
import torch

from curate.corpus.render import Rendered
from curate.curvature.behaviour import BehaviourSpec, make_behaviour, query_gradients
from curate.curvature.items import item_gradients
from curate.curvature.queries import Query
from curate.errors import CurvatureError
from curate.models.splice import spliced
from curate.models.tracked import LayerChoice, tracked_layers
from tests.curvature.curves import Dense, random_sae, small
from tests.curvature.oracle import make_rows

PAD = 3
ITEMS = [Query(f"item {i}", row) for i, row in enumerate(make_rows(3, vocab=40, longest=8))]
LOSS = make_behaviour(BehaviourSpec("loss"))


def test_one_gradient_an_item_whose_mean_is_that_of_all():
    model = small("gpt2")
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    found = item_gradients(model, layers, LOSS, ITEMS, PAD)
    assert list(found) == [q.id for q in ITEMS]
    whole = query_gradients(model, layers, [LOSS], ITEMS, PAD)["loss"]
    for layer in layers:
        mean = torch.stack([found[q.id][layer.name] for q in ITEMS]).mean(0)
        torch.testing.assert_close(mean, whole[layer.name], rtol=1e-9, atol=1e-12)


def test_within_a_splice_they_are_those_of_the_spliced_model():
    model, sae = small("gpt2"), random_sae(1)
    layers, _ = tracked_layers(model, LayerChoice("mlp", first=1))
    with spliced(model, sae):
        found = item_gradients(model, layers, LOSS, ITEMS, PAD)
    for query in ITEMS:
        dense = Dense(model, layers, [query.positive], sae=sae)
        theta = dense.theta.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(-dense.loss(theta), theta)
        got = dense.flat({name: block[None] for name, block in found[query.id].items()})[0]
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


def test_items_that_cannot_be_used_are_named():
    model = small("gpt2")
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    with pytest.raises(CurvatureError, match="no test item"):
        item_gradients(model, layers, LOSS, [], PAD)
    with pytest.raises(CurvatureError, match="2 test items have the id 'item 1'"):
        item_gradients(model, layers, LOSS, [*ITEMS, ITEMS[1]], PAD)
    silent = Query("silent", Rendered([4], 0, 1, 1))  # one token, which nothing predicts
    with pytest.raises(CurvatureError, match="'silent' has no response token that the model predicts"):
        item_gradients(model, layers, LOSS, [ITEMS[0], silent], PAD)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    with pytest.raises(CurvatureError, match=r"item 'item 0': the gradient of 'loss' is zero"):
        item_gradients(model, layers, LOSS, ITEMS, PAD)
