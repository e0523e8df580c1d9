"""Baselines that need no concept: random, response length, activation norm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from curate.corpus.example import Example, Message
from curate.errors import ConfigError
from curate.scoring.activation_norm import ActivationNorm
from curate.scoring.base import Batch, Needs, column
from curate.scoring.known_label import KnownLabel
from curate.scoring.random import Random
from curate.scoring.response_length import ResponseLength
from tests.scoring.rows import make_concept, make_examples, render, renderer

EXAMPLES = make_examples()


def test_random_depends_on_seed_and_id_alone():
    scores = Random(seed=1).score(Batch(EXAMPLES))["random"]
    moved = [replace(e, row=99, label="x") for e in reversed(EXAMPLES)]
    assert Random(seed=1).score(Batch(moved))["random"].tolist() == scores[::-1].tolist()
    assert (Random(seed=2).score(Batch(EXAMPLES))["random"] != scores).all()


def test_random_is_uniform():
    turns = (Message("user", "a"), Message("assistant", "b"))
    scores = Random().score(Batch([Example(f"id {i}", i, turns) for i in range(20_000)]))["random"]
    assert stats.kstest(scores, "uniform").pvalue > 0.01
    assert scores.min() >= 0
    assert scores.max() < 1
    assert abs(stats.spearmanr(scores[:-1], scores[1:]).statistic) < 0.03


def test_known_labels_rank_above_all_others_and_by_chance_within():
    rows = [replace(EXAMPLES[0], id=f"r{i}", label=("bad", "good", None)[i % 3]) for i in range(300)]
    scores = KnownLabel("bad", seed=1).score(Batch(rows))["known_label"]
    bad, good, unknown = scores[0::3], scores[1::3], scores[2::3]
    assert bad.min() >= 1 > good.max() >= 0
    assert np.isnan(unknown).all()
    assert stats.kstest((bad - 1) * 2, "uniform").pvalue > 0.01
    assert (KnownLabel("bad", seed=2).score(Batch(rows))["known_label"][0::3] != bad).all()


def test_response_length_counts_the_tokens_of_the_response():
    lengths = ResponseLength().score(Batch(EXAMPLES, render(EXAMPLES)))["response_length"]
    tokenizer = renderer().tokenizer
    assert lengths.tolist() == [len(tokenizer(e.response, add_special_tokens=False)["input_ids"]) for e in EXAMPLES]


def test_activation_norm():
    states = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    scorer = ActivationNorm(layers=[2, 0])
    found = scorer.score(Batch(EXAMPLES[:5], pooled={0: states, 2: 2 * states}))
    assert list(found) == ["activation_norm.L2", "activation_norm.L0"]
    want = np.sqrt((states.numpy().astype(np.float64) ** 2).sum(1))
    np.testing.assert_allclose(found["activation_norm.L0"], want, rtol=1e-6)
    np.testing.assert_allclose(found["activation_norm.L2"], 2 * want, rtol=1e-6)


def test_activation_norm_takes_the_layers_of_the_concepts():
    assert ActivationNorm([make_concept(layer=2), make_concept("b", layer=1)]).layers == (2, 1)
    with pytest.raises(ConfigError, match="activation_norm has no layer"):
        ActivationNorm([make_concept(layer=None)])


def test_column_names():
    assert column("vector_filter", "sycophantic", 15) == "vector_filter.sycophantic.L15"
    assert column("activation_norm", layer=0) == "activation_norm.L0"
    assert column("random") == "random"


def test_needs_add_up():
    total = Needs.union([Needs(frozenset({1})), Needs(frozenset({2}), generated=frozenset({1})), Needs(tokens=True)])
    assert total == Needs(frozenset({1, 2}), frozenset({1}), frozenset(), True)
    assert total.model
    assert total.rendered
    assert not Needs(tokens=True).model
    assert not Needs().rendered
