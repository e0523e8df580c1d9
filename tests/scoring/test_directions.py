"""Projection on unit concept vectors, and concepts that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.errors import ConceptError, ConfigError
from curate.scoring.directions import Directions
from tests.scoring.rows import make_concept


def test_projects_on_unit_vectors_in_the_order_of_the_columns():
    a, b = make_concept("a", layer=1), make_concept("b", layer=2, seed=4)
    directions = Directions("vector_filter", [a, b], [2, 1])
    x = {k: torch.randn(6, 32, generator=torch.Generator().manual_seed(k)) for k in (1, 2)}
    found = directions.project(x)
    assert list(found) == directions.columns()
    assert list(found) == [f"vector_filter.{c}.L{k}" for c in "ab" for k in (2, 1)]
    for concept in (a, b):
        for layer in (1, 2):
            v = concept.vectors[layer].astype(np.float64)
            want = x[layer].numpy().astype(np.float64) @ v / np.linalg.norm(v)
            np.testing.assert_allclose(found[f"vector_filter.{concept.name}.L{layer}"], want, rtol=1e-5, atol=1e-6)


def test_without_layers_each_concept_uses_its_own():
    directions = Directions("m", [make_concept("a", layer=1), make_concept("b", layer=3)])
    assert directions.columns() == ["m.a.L1", "m.b.L3"]
    assert directions.layers == {1, 3}


def test_the_fingerprint_follows_what_changes_the_scores():
    prints = [
        Directions("m", [make_concept(seed=seed)], layers).fingerprint()
        for seed, layers in ((0, [1]), (0, [1]), (1, [1]), (0, [2]))
    ]
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]
    assert prints[0] != prints[3]


@pytest.mark.parametrize(
    ("concepts", "layers", "error", "message"),
    [
        ([], None, ConfigError, "'vector_filter' needs a concept"),
        ([make_concept("a"), make_concept("a")], None, ConfigError, "two concepts are named 'a'"),
        ([make_concept(layer=None)], None, ConfigError, r"recommends no layer; .*scorer.vector_filter.layers="),
        ([make_concept()], [], ConfigError, "layers is empty"),
        ([make_concept()], [-1], ConfigError, "holds -1"),
        ([make_concept()], [1.5], ConfigError, "holds 1.5"),
        ([make_concept()], "15", ConfigError, "holds"),
        ([make_concept()], [9], ConceptError, "layer 9"),
        ([make_concept("a"), make_concept("b", d=16)], [1], ConceptError, "different widths at layer 1"),
    ],
)
def test_what_cannot_be_used(concepts, layers, error, message):
    with pytest.raises(error, match=message):
        Directions("vector_filter", concepts, layers)
