"""Factor files: what is written is read again; half a folder and another model's factors are refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from connectors import storage
from curate.curvature.ekfac import Eigenbasis, make_factor
from curate.curvature.files import FactorIndex, load_factor, load_index, save_factor, save_index
from curate.curvature.fisher import CurvatureSpec
from curate.errors import CurvatureError
from curate.models.tracked import LayerChoice, tracked_layers
from tests.tiny import tiny_model

MODEL = {"name": "LlamaForCausalLM 3x32", "layers": 3, "width": 32, "digest": "a" * 32, "adapter": None}


def basis(n):
    return Eigenbasis(torch.linalg.qr(torch.randn(n, n))[0], torch.rand(n))


def make(layers, kind):
    q_in = {layer.reads: basis(layer.width) for layer in layers}
    if kind == "diagonal":
        return [make_factor(layer, kind, corrected=torch.rand(layer.out, layer.width)) for layer in layers]
    return [
        make_factor(layer, kind, q_in[layer.reads], basis(layer.out), torch.rand(layer.out, layer.width))
        for layer in layers
    ]


def write(url, kind="ekfac"):
    layers, coverage = tracked_layers(tiny_model("llama", layers=2), LayerChoice())
    factors = make(layers, kind)
    for factor in factors:
        save_factor(url, factor)
    spec = CurvatureSpec(kind=kind, layers=LayerChoice(pattern="proj"))
    index = FactorIndex("d1", MODEL, spec, tuple(layers), coverage, 70, 900)
    save_index(url, index)
    return factors, index


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_round_trip(tmp_path, kind, scheme):
    url = f"{scheme}{tmp_path}/factors-{kind}"
    factors, index = write(url, kind)
    assert load_index(url, MODEL) == index
    for factor in factors:
        again = load_factor(url, factor.layer, kind)
        assert again.layer == factor.layer
        assert again.kind == kind
        for part in ("eigenvalues", "q_out", "q_in"):
            want = getattr(factor, part)
            assert want is None if getattr(again, part) is None else torch.equal(getattr(again, part), want)


def test_a_shared_input_basis_is_stored_once(tmp_path):
    write(str(tmp_path))
    assert sorted(p.name.split(".")[4] for p in (tmp_path / "inputs").iterdir()) == [
        "o_proj",
        "o_proj",
        "q_proj",
        "q_proj",
    ]
    assert len(list((tmp_path / "layers").iterdir())) == 8


def test_the_identity_has_no_files(tmp_path):
    layers, coverage = tracked_layers(tiny_model("llama", layers=2), LayerChoice())
    save_index(str(tmp_path), FactorIndex("d", MODEL, CurvatureSpec("identity"), tuple(layers), coverage, 0, 0))
    assert load_index(str(tmp_path)).spec.kind == "identity"
    assert load_factor(str(tmp_path), layers[0], "identity").eigenvalues is None


@pytest.mark.parametrize("change", [{"digest": "b" * 32}, {"adapter": "c" * 32}])
def test_factors_of_another_model_name_both(tmp_path, change):
    write(str(tmp_path))
    other = {**MODEL, "name": "Qwen2ForCausalLM 3x32", **change}
    with pytest.raises(CurvatureError, match=r"LlamaForCausalLM.*aaaa.*Qwen2ForCausalLM"):
        load_index(str(tmp_path), other)


def test_an_unfinished_folder(tmp_path):
    write(str(tmp_path))
    (tmp_path / "factors.json").unlink()
    with pytest.raises(CurvatureError, match=r"no factors\.json"):
        load_index(str(tmp_path))


@pytest.mark.parametrize("folder", ["layers", "inputs"])
def test_a_missing_file_is_named(tmp_path, folder):
    write(str(tmp_path))
    gone = min((tmp_path / folder).iterdir())
    gone.unlink()
    with pytest.raises(CurvatureError, match=f"incomplete.*{folder}/{gone.name}"):
        load_index(str(tmp_path))


def test_a_broken_layer_file(tmp_path):
    factors, _ = write(str(tmp_path))
    layer = factors[0].layer
    path = tmp_path / "layers" / f"{layer.name}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CurvatureError, match="broken"):
        load_factor(str(tmp_path), layer, "ekfac")
    path.write_bytes(safetensors.torch.save({"eigenvalues": torch.ones(2, 2)}))
    with pytest.raises(CurvatureError, match=r"shape \(2, 2\), not \(32, 32\)"):
        load_factor(str(tmp_path), layer, "ekfac")
    path.write_bytes(safetensors.torch.save({"eigenvalues": torch.ones(32, 32)}))
    with pytest.raises(CurvatureError, match="no q_out"):
        load_factor(str(tmp_path), layer, "ekfac")
    path.write_bytes(safetensors.torch.save({"eigenvalues": torch.full((32, 32), float("nan"))}))
    with pytest.raises(CurvatureError, match="not finite"):
        load_factor(str(tmp_path), layer, "diagonal")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "'other'"),
        ({"version": 99}, "version 99"),
        ({"layers": [{"name": "q"}]}, "broken"),
        ({"spec": {"kind": "ekfac"}}, "broken"),
    ],
)
def test_a_broken_index(tmp_path, change, words):
    write(str(tmp_path))
    url = storage.join(str(tmp_path), "factors.json")
    storage.write_atomic(url, json.dumps({**json.loads(storage.read_text(url)), **change}))
    with pytest.raises(CurvatureError, match=words):
        load_index(str(tmp_path))
    storage.write_atomic(url, "{")
    with pytest.raises(CurvatureError, match="broken"):
        load_index(str(tmp_path))
