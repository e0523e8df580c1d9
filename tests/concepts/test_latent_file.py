"""Concepts of latents that know their SAE's file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from curate.concepts import concept as files
from curate.concepts.latent_file import facts_of, latent_concepts, latents_of
from curate.concepts.sae import digest
from curate.concepts.sae_files import save
from curate.errors import ConceptError, StorageError
from tests.saes import random_sae
from tests.scoring.rows import make_concept

MODEL = {"name": "Tiny 3x32", "layers": 3, "width": 32, "digest": "aa", "adapter": None}


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    save(str(tmp_path / "saes" / "one"), random_sae(layer=2))
    monkeypatch.chdir(tmp_path)
    return "saes/one"


def test_a_latent_is_found_again_from_its_concept_in_any_folder(url, tmp_path, monkeypatch):
    made = latent_concepts(url, [7, 3], MODEL)
    assert [(c.name, c.layer) for c in made] == [("random-7", 2), ("random-3", 2)]
    stored = [files.load(files.save(c, str(tmp_path / c.name))) for c in made]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    seven, three = latents_of(stored)
    assert (seven.index, three.index) == (7, 3)
    assert seven.sae is three.sae
    assert digest(seven.sae) == facts_of(made[0])[0]


def test_options_of_reading_are_part_of_it(url):
    (made,) = latent_concepts(url, [1], MODEL, name="other", layer=2, format="saelens")
    assert made.name == "other-1"
    assert latents_of([made])[0].sae.name == "other"


@pytest.mark.parametrize(
    ("latents", "said"),
    [([], "give different ones, at least one"), ([1, 1], "give different ones"), ([99], "there is no latent 99")],
)
def test_latents_that_cannot_be(url, latents, said):
    with pytest.raises(ConceptError, match=said):
        latent_concepts(url, latents, MODEL)


def test_an_sae_of_another_model_width_or_layer_is_refused(url):
    save(url, replace(random_sae(layer=2), model={"digest": "bb"}))
    with pytest.raises(ConceptError, match="Latents of one model mean nothing in another"):
        latent_concepts(url, [1], MODEL)
    assert latent_concepts(url, [1], MODEL, allow_other_model=True)
    with pytest.raises(ConceptError, match="has width 32"):
        latent_concepts(url, [1], {**MODEL, "width": 16}, allow_other_model=True)
    with pytest.raises(ConceptError, match="is of layer 2"):
        latent_concepts(url, [1], {**MODEL, "layers": 1}, allow_other_model=True)


def test_another_sae_in_its_place_or_none(url, tmp_path):
    (made,) = latent_concepts(url, [1], MODEL)
    save(url, random_sae(layer=2, seed=1))
    with pytest.raises(ConceptError, match="is another one than that of the concept 'random-1'"):
        latents_of([made])
    for file in (tmp_path / "saes" / "one").iterdir():
        file.unlink()
    with pytest.raises((ConceptError, StorageError), match="saes/one"):
        latents_of([made])


def test_other_concepts_are_no_latents():
    with pytest.raises(ConceptError, match=r"'trait' .* is no latent of an SAE file"):
        facts_of(make_concept())
