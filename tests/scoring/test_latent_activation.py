"""Activations of latents as scores, against one row, token and latent at a time; and what leaves the pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.concepts.latent_file import latent_concepts
from curate.concepts.sae import dense
from curate.concepts.sae_files import save
from curate.errors import ConceptError, ConfigError
from curate.scoring import readouts
from curate.scoring.base import Readout
from curate.scoring.readouts import pooled_readout
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass
from tests.saes import random_sae
from tests.scoring.rows import make_concept, make_examples, render
from tests.tiny import tiny_model

EXAMPLES = make_examples()
RENDERED = render(EXAMPLES)
MODEL = {"name": "Tiny 3x32", "layers": 3, "width": 32, "digest": "aa", "adapter": None}
FORMS = {
    "topk": {},
    "relu": {"activation": "relu", "k": None},
    "jumprelu": {"activation": "jumprelu", "k": None, "threshold": torch.full((48,), 0.2)},
}


def by_hand(model, sae, latent: int, pooling: str) -> list[float]:
    found = []
    for row in RENDERED:
        with torch.no_grad():
            states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[sae.layer]
        values = [float(dense(sae, states[0, t])[latent]) for t in range(row.start, row.stop)]
        found.append(max(values) if pooling == "max" else sum(values) / len(values))
    return found


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("form", list(FORMS))
def test_scores_are_those_of_single_tokens(tmp_path, form, pooling):
    model = tiny_model("llama")
    high, low = random_sae(layer=2, **FORMS[form]), random_sae(layer=1, seed=1, name="low", **FORMS[form])
    concepts = []
    for sae, latents in ((high, [5, 0]), (low, [11])):
        save(str(tmp_path / sae.name), sae)
        concepts += latent_concepts(str(tmp_path / sae.name), latents, MODEL)
    concepts = [concepts[0], concepts[2], concepts[1]]  # latents of one SAE need not stand together
    (scorer,) = make_scorers({"latent_activation": {"pooling": pooling}}, concepts)
    found = SharedPass(model, [scorer], max_tokens=70).run(EXAMPLES, RENDERED).columns
    targets = {"random-5": (high, 5), "low-11": (low, 11), "random-0": (high, 0)}
    assert list(found) == [f"latent_activation.{name}" for name in targets]
    for name, (sae, latent) in targets.items():
        expected = by_hand(model, sae, latent, pooling)
        assert max(expected) > 0
        np.testing.assert_allclose(found[f"latent_activation.{name}"], expected, rtol=1e-4, atol=1e-6)


def test_beside_scorers_that_take_gradients_and_means(tmp_path):
    model = tiny_model("llama")
    save(str(tmp_path), random_sae(layer=1))
    latents = latent_concepts(str(tmp_path), [5], MODEL)
    alone = SharedPass(model, make_scorers({"latent_activation": {}}, latents)).run(EXAMPLES, RENDERED).columns
    settings = {"latent_activation": {}, "vector_filter": {}, "loss_gradient_alignment": {}}
    scorers = make_scorers(settings, latents)
    found = SharedPass(model, scorers, max_tokens=90).run(EXAMPLES, RENDERED).columns
    assert set(found) == {f"{name}.random-5" + ("" if name == "latent_activation" else ".L1") for name in settings}
    name = "latent_activation.random-5"
    np.testing.assert_allclose(found[name], alone[name], rtol=1e-4, atol=1e-6)
    (filtered,) = make_scorers({"vector_filter": {}}, latents)
    means = SharedPass(model, [filtered]).run(EXAMPLES, RENDERED).columns
    np.testing.assert_allclose(found["vector_filter.random-5.L1"], means["vector_filter.random-5.L1"], rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_tokens_are_read_in_bounded_portions(monkeypatch, pooling):
    hidden = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))
    starts, stops = [1, 0, 8, 2], [9, 3, 9, 7]
    seen = []

    def read(states):
        seen.append(len(states))
        return states[:, :2].square()

    readout = Readout("r", 1, read, 2, pooling, most=5)
    whole = pooled_readout(readout, hidden, starts, stops)
    assert seen == [17]
    monkeypatch.setattr(readouts, "_CHUNK", 20)
    seen.clear()
    np.testing.assert_allclose(pooled_readout(readout, hidden, starts, stops), whole, rtol=1e-6)
    assert seen == [4, 4, 4, 4, 1]
    for i, (a, b) in enumerate(zip(starts, stops, strict=True)):
        span = hidden[i, a:b, :2].square()
        expected = span.mean(0) if pooling == "mean" else span.amax(0)
        np.testing.assert_allclose(whole[i], expected, rtol=1e-5)


def test_the_fingerprint_follows_what_changes_a_score(tmp_path):
    prints = []
    for i, sae in enumerate([random_sae(), random_sae(seed=1)]):
        save(str(tmp_path / str(i)), sae)
        for latent in (1, 2):
            for pooling in ("mean", "max"):
                concepts = latent_concepts(str(tmp_path / str(i)), [latent], MODEL)
                (scorer,) = make_scorers({"latent_activation": {"pooling": pooling}}, concepts)
                prints.append(str(scorer.fingerprint()))
    assert len(set(prints)) == 8


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="needs latents and none is given; set concept=sae"):
        make_scorers({"latent_activation": {}})
    with pytest.raises(ConceptError, match="is no latent of an SAE file"):
        make_scorers({"latent_activation": {}}, [make_concept()])
    save(str(tmp_path), random_sae())
    concepts = latent_concepts(str(tmp_path), [1], MODEL)
    with pytest.raises(ConfigError, match="pooling is 'maximum'"):
        make_scorers({"latent_activation": {"pooling": "maximum"}}, concepts)
    save(str(tmp_path), replace(random_sae(), layer=3, name="moved"))
    (scorer,) = make_scorers({"latent_activation": {}}, concepts)
    with pytest.raises(ConceptError, match="is another one than that of the concept"):
        SharedPass(tiny_model("llama"), [scorer])
