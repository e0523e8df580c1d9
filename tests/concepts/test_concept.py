"""Concept files: what is written is read back, and what is broken or foreign is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from curate.concepts.concept import Concept, check_fits, digest, direction, load, same_model, save
from curate.errors import ConceptError, StorageError

MODEL = {"name": "LlamaForCausalLM 3x8", "layers": 3, "width": 8, "digest": "aa" * 16, "adapter": None}


def concept(**changes) -> Concept:
    vectors = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    fields = {"name": "evil", "vectors": vectors, "layer": 2, "model": MODEL, "method": "persona.teacher_forced"}
    return Concept(**{**fields, "pooling": "response_mean", "meta": {"pairs": 5}, **changes})


def test_direction_is_the_unit_vector():
    c = concept()
    v = c.vectors[1].astype(np.float64)
    np.testing.assert_allclose(direction(c, 1), v / np.sqrt((v**2).sum()), rtol=1e-6)
    np.testing.assert_array_equal(direction(c), direction(c, 2))
    assert direction(c).dtype == np.float32


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_direction_of_tiny_and_huge_vectors(scale):
    c = concept()
    scaled = concept(vectors=c.vectors * np.float32(scale))
    np.testing.assert_allclose(direction(scaled), direction(c), rtol=1e-5)


def test_direction_names_the_usable_layers():
    v = concept().vectors.copy()
    v[0], v[3] = np.nan, 0
    c = concept(vectors=v, layer=None)
    for layer in (0, 3):
        with pytest.raises(ConceptError, match=r"no direction at layer \d: its vector is zero or not defined.*1-2"):
            direction(c, layer)
    for layer in (-1, 4):
        with pytest.raises(ConceptError, match="its layers are 0 to 3"):
            direction(c, layer)
    with pytest.raises(ConceptError, match="recommends no layer; name one, of 1-2"):
        direction(c)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "cannot be called 'a b'"),
        ({"name": ""}, "cannot be called ''"),
        ({"vectors": np.ones(8)}, r"shape \(8,\), expected"),
        ({"vectors": np.full((4, 8), np.inf)}, "layer 0 holds NaN or infinite values .4 of 4"),
        ({"vectors": np.zeros((4, 8))}, "no direction at any layer"),
        ({"vectors": np.full((4, 8), np.nan)}, "no direction at any layer"),
        ({"layer": 9}, "no direction at layer 9"),
        ({"pooling": "mean"}, "unknown pooling 'mean'"),
    ],
)
def test_bad_concepts_are_refused(changes, message):
    with pytest.raises(ConceptError, match=message):
        concept(**changes)


def test_partly_nan_row_is_refused():
    v = concept().vectors.copy()
    v[2, 3] = np.nan
    with pytest.raises(ConceptError, match="layer 2 holds NaN"):
        concept(vectors=v)


@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_saved_and_loaded_concepts_are_equal(tmp_path, suffix):
    v = concept().vectors.copy()
    v[0] = np.nan
    c = concept(vectors=v, meta={"profile": [{"layer": 0, "auc": float("nan")}], "n": np.int64(3)})
    written = save(c, str(tmp_path / "evil") + suffix)
    assert written == str(tmp_path / "evil.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.json", "evil.safetensors"]
    back = load(str(tmp_path / "evil") + suffix)
    np.testing.assert_array_equal(back.vectors, c.vectors)
    assert (back.name, back.layer, back.model, back.method) == (c.name, c.layer, c.model, c.method)
    assert back.meta == {"profile": [{"layer": 0, "auc": None}], "n": 3}
    assert digest(back) == digest(c)
    # readable by anybody: plain safetensors, strict JSON
    raw = safetensors.numpy.load_file(tmp_path / "evil.safetensors")
    np.testing.assert_array_equal(raw["vectors"], c.vectors)
    assert "NaN" not in (tmp_path / "evil.json").read_text()
    assert load(written, name="other").name == "other"


def test_save_and_load_on_an_object_store():
    c = concept(name="mem")
    assert digest(load(save(c, "memory://concepts/mem"))) == digest(c)


def test_digest_follows_what_changes_a_score_and_nothing_else():
    c = concept()
    assert digest(concept(meta={"pairs": 6}, method="other")) == digest(c)
    v = c.vectors.copy()
    v[0, 0] += 1e-3
    others = [concept(name="x"), concept(layer=1), concept(vectors=v), concept(model={}), concept(layer=None)]
    assert len({digest(c), *map(digest, others)}) == 6
    zero, minus = c.vectors.copy(), c.vectors.copy()
    zero[0, 0], minus[0, 0] = 0.0, -0.0
    assert digest(concept(vectors=zero)) == digest(concept(vectors=minus))


def test_half_a_pair_and_broken_pairs_are_refused(tmp_path):
    stem = str(tmp_path / "evil")
    save(concept(), stem)
    text, raw = (tmp_path / "evil.json").read_text(), (tmp_path / "evil.safetensors").read_bytes()

    (tmp_path / "evil.json").unlink()
    with pytest.raises(ConceptError, match=r"has no .*evil\.json beside it"):
        load(stem)
    (tmp_path / "evil.json").write_text(text[: len(text) // 2])
    with pytest.raises(ConceptError, match="is broken: JSONDecodeError"):
        load(stem)
    (tmp_path / "evil.json").write_text('{"a": 1}')
    with pytest.raises(ConceptError, match="is not a concept file"):
        load(stem)
    (tmp_path / "evil.json").write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(ConceptError, match="version 99"):
        load(stem)
    (tmp_path / "evil.json").write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "pooling"}))
    with pytest.raises(ConceptError, match="is broken: KeyError: 'pooling'"):
        load(stem)
    (tmp_path / "evil.json").write_text(text)
    (tmp_path / "evil.safetensors").write_bytes(raw[:-10])
    with pytest.raises(ConceptError, match="is broken: SafetensorError"):
        load(stem)
    # a save of other vectors that stopped before its JSON
    other = safetensors.numpy.save({"vectors": concept().vectors + 1})
    (tmp_path / "evil.safetensors").write_bytes(other)
    with pytest.raises(ConceptError, match="do not belong together"):
        load(stem)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(StorageError, match=r"nothing\.json"):
        load(str(tmp_path / "nothing"))
    (tmp_path / "v.npz").write_bytes(b"x")
    with pytest.raises(ConceptError, match=r"unknown kind of concept file; known are \.json"):
        load(str(tmp_path / "v.npz"))
    save(concept(), str(tmp_path / "evil.v2"))
    assert load(str(tmp_path / "evil.v2")).name == "evil"


def test_check_fits():
    c = concept()
    check_fits(c, 3, 8, MODEL, layers=[1, 2])
    check_fits(c, 3, 8, {**MODEL, "name": "the same weights elsewhere"})
    check_fits(concept(model={}), 3, 8, MODEL)
    with pytest.raises(ConceptError, match=r"width 8, the model .* has 16"):
        check_fits(c, 3, 16, MODEL)
    with pytest.raises(ConceptError, match=r"4 rows, made for a model of 3 layers; .* has 5 layers .6 rows"):
        check_fits(c, 5, 8, MODEL)
    with pytest.raises(ConceptError, match="made for a model of 3 layers"):
        check_fits(c, 2, 8, MODEL)
    with pytest.raises(ConceptError, match="no direction at layer 4"):
        check_fits(c, 3, 8, MODEL, layers=[4])
    other = {**MODEL, "name": "Other", "digest": "bb" * 16}
    with pytest.raises(
        ConceptError, match=r"LlamaForCausalLM 3x8 \(digest aaaaaaaaaaaa\).*Other \(digest bbbbbbbbbbbb"
    ):
        check_fits(c, 3, 8, other)
    check_fits(c, 3, 8, other, allow_other_model=True)
    with pytest.raises(ConceptError, match="adapter cc"):
        check_fits(c, 3, 8, {**MODEL, "adapter": "cc" * 16})


def test_partial_rows_fit_a_deeper_model_but_not_a_shallower_one():
    c = concept(meta={"partial_rows": True})
    check_fits(c, 5, 8, MODEL)
    with pytest.raises(ConceptError, match="4 rows"):
        check_fits(c, 2, 8, MODEL)


def test_same_model():
    assert same_model({}, MODEL)
    assert same_model(MODEL, dict(MODEL))
    assert not same_model(MODEL, {**MODEL, "digest": "cc"})


def test_vectors_cannot_be_changed_by_accident():
    c = concept()
    with pytest.raises(ValueError, match="read-only"):
        c.vectors[0, 0] = 1
    assert replace(c, layer=1).layer == 1
