"""Columns' names in words."""

from __future__ import annotations

import pytest

from curate.reports.words import column


@pytest.mark.parametrize(
    ("name", "concept", "behaviour", "layer", "title"),
    [
        ("random", None, None, None, "random"),
        ("activation_norm.L15", None, None, 15, "activation norm, layer 15"),
        ("vector_filter.sycophantic.L15", "sycophantic", None, 15, "vector filter, sycophantic, layer 15"),
        ("influence_function.loss", None, "loss", None, "influence function, loss"),
        ("influence_function.contrast.whole", None, "contrast", None, "influence function, contrast, whole"),
        ("concept_influence.evil.L16.cosine", "evil", None, 16, "concept influence, evil, layer 16, cosine"),
        (
            "gradient_product.v1.2.contrast.L3.last_prompt_token.whole",
            "v1.2",
            "contrast",
            3,
            "gradient product, v1.2, contrast, layer 3, last prompt token whole",
        ),
    ],
)
def test_a_name_is_taken_apart(name, concept, behaviour, layer, title):
    found = column(name)
    assert (found.concept, found.behaviour, found.layer, found.title) == (concept, behaviour, layer, title)
    assert found.meaning
