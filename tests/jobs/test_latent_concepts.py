"""Latents of an SAE file through the jobs: directions, activations and influence on them; settings that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectors import storage
from curate.concepts.sae import SAE, dense
from curate.concepts.sae_files import save
from curate.curvature.test_vector import load
from curate.errors import ConceptError, ConfigError
from curate.models.load import ModelSpec, identity, load_model, load_tokenizer
from curate.models.tap import LayerTap
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import options, run_job, scores
from tests.saes import random_sae

pytestmark = pytest.mark.usefixtures("here")
QUERIES = [{"prompt": f"is {i} good?", "positive": f"yes, {i} is best", "negative": "no, think"} for i in range(2)]


@pytest.fixture
def sae(model: Path, tmp_path: Path) -> SAE:
    """At layer 2 of the model, with a bias that lets latents fire often; its file is <tmp>/sae."""
    often = {"b_enc": torch.full((12,), 0.3), "model": identity(ModelSpec(str(model)))}
    found = replace(random_sae(h=12, activation="relu", k=None), **often)
    save(str(tmp_path / "sae"), found)
    return found


@pytest.fixture
def given(model: Path, tmp_path: Path, sae: SAE):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [conversation(i) for i in range(12)])
    write_jsonl(tmp_path / "queries.jsonl", QUERIES)

    def make(**more: object) -> list[str]:
        base = {
            "concept": "[sae]",
            "concept.file.path": None,
            "concept.sae.path": tmp_path / "sae",
            "concept.sae.latents": "[4,7]",
            "scorer": "[vector_filter,latent_activation]",
            "sink.store": tmp_path / "store",
        }
        return options(tmp_path / "corpus", model, tmp_path / "out", **{**base, **more})

    return make


@torch.no_grad()
def response_states(model: Path, layer: int) -> dict[str, torch.Tensor]:
    """By row, the states of its response tokens, one row at a time."""
    spec = ModelSpec(str(model))
    tokenizer, network = load_tokenizer(spec), load_model(spec)
    out = {}
    for i in range(12):
        row = conversation(i)
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        answer = row["messages"][-1]["content"]
        first = text.rindex(answer)
        enc = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = torch.tensor([a < first + len(answer) and b > first for a, b in enc["offset_mapping"]])
        out[row["id"]] = LayerTap(network, [layer])(torch.tensor([enc["input_ids"]]))[layer][0][inside]
    return out


def test_latents_filter_and_score_rows(given, model, tmp_path, sae) -> None:
    run_job("score", given())
    states = response_states(model, 2)
    for latent in (4, 7):
        v = sae.w_dec[latent] / sae.w_dec[latent].norm()
        filtered = scores(tmp_path / "out", f"vector_filter.random-{latent}.L2")
        active = scores(tmp_path / "out", f"latent_activation.random-{latent}")
        assert max(active.values()) > 0
        for row, x in states.items():
            np.testing.assert_allclose(filtered[row], float(x.mean(0) @ v), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(active[row], float(dense(sae, x)[:, latent].mean()), rtol=1e-4, atol=1e-5)


def test_influence_on_a_latent_and_the_concept_job(given, tmp_path, sae, capsys) -> None:
    more = {
        "scorer": "[gradient_product]",
        "scorer.gradient_product.behaviours": "[latent,latent_contrast,concept]",
        "query": "file",
        "query.path": tmp_path / "queries.jsonl",
        "concept.sae.latents": "[4]",
    }
    run_job("score", given(**more))
    names = ["random-4.latent.L2", "random-4.latent_contrast.L2", "random-4.L2"]
    found = {name: scores(tmp_path / "out", f"gradient_product.{name}") for name in names}
    assert all(len(set(f.values())) == 12 for f in found.values())
    (url,) = (f.url for f in storage.list_files(str(tmp_path / "store" / "test_vectors")) if f.url.endswith(".json"))
    assert list(load(url).names) == names
    run_job("concept", given(**more))
    assert "random-4: sae_latent, layer 2, width 32" in capsys.readouterr().out
    # Another encoder with the same decoder is another behaviour.
    save(str(tmp_path / "sae"), replace(sae, b_enc=sae.b_enc + 0.05))
    run_job("score", given(**{**more, "sink.url": tmp_path / "again"}))
    again = scores(tmp_path / "again", "gradient_product.random-4.latent.L2")
    assert again != found[names[0]]


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"concept.sae.latents": None}, ConfigError, r"concept\.sae\.latents is not set"),
        ({"concept.sae.latents": "[]"}, ConceptError, "give different ones, at least one"),
        ({"concept.sae.latents": "[12]"}, ConceptError, "there is no latent 12"),
        ({"concept.sae.latents": "[four]"}, ConfigError, r"concept\.sae\.latents"),
        ({"concept.sae.layer": 1}, ConceptError, "is of layer 2, but layer=1 is given"),
        ({"concept.sae.path": "[a,b]"}, ConfigError, "'sae' is made from one file"),
        ({"scorer": "[gradient_product]", "scorer.gradient_product.behaviours": "[latents]"}, ConfigError, "'latent'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(given, tmp_path, more, error, said) -> None:
    if "scorer" in more:
        more = {**more, "query": "file", "query.path": tmp_path / "queries.jsonl"}
    with pytest.raises(error, match=said):
        run_job("score", given(**more))


def test_an_sae_of_another_model_or_a_concept_that_is_no_latent(given, model, tmp_path, sae) -> None:
    save(str(tmp_path / "sae"), replace(sae, model={**sae.model, "digest": "other"}))
    with pytest.raises(ConceptError, match="Latents of one model mean nothing in another"):
        run_job("score", given())
    run_job("score", given(**{"concept.sae.allow_other_model": "true"}))
    plain = {"concept": "[file]", "concept.sae.path": None, "concept.sae.latents": None, "sink.url": tmp_path / "other"}
    with pytest.raises(ConceptError, match=r"'test' .* is no latent of an SAE file"):
        run_job("score", given(**{**plain, "concept.file.path": model.parent / "concept"}))
