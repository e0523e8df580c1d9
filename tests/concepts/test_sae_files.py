"""SAE files: round trips of ours, and SAELens' against its own code and against plain formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curate.concepts.sae import dense, digest, folded, reconstruct
from curate.concepts.sae_files import load, save
from curate.concepts.sae_read import hook_of
from curate.errors import ConceptError, StorageError
from tests.concepts import sae_peers
from tests.concepts.sae_layouts import formula, parts, randomise, same, top5, write
from tests.concepts.test_sae import FORMS, D, H, some_sae, states

# ours


@pytest.mark.parametrize("activation", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", ["twice", "after only", "two"])
def test_what_is_saved_is_what_is_read(tmp_path: Path, activation: str, dtype: torch.dtype, bias: str) -> None:
    sae = some_sae(activation, meta={"epochs": 2}).to(dtype=dtype)
    if bias != "two":
        sae = replace(sae, b_pre=sae.b_dec if bias == "twice" else torch.zeros_like(sae.b_dec))
    url = str(tmp_path / "one")
    assert save(url, sae) == f"{url}/cfg.json"
    read, wrote = load(url), folded(sae)
    assert {n: t.dtype for n, t in read.tensors().items()} == {n: dtype for n in wrote.tensors()}
    for name, tensor in wrote.tensors().items():
        assert torch.equal(read.tensors()[name], tensor), name
    assert digest(read) == digest(wrote)
    facts = ("activation", "layer", "name", "k", "scale", "normalise", "model", "meta")
    assert all(getattr(read, f) == getattr(wrote, f) for f in facts)


@pytest.mark.parametrize("form", [{"scale": 0.3}, {"normalise": "layer_norm"}, {"normalise": "constant_norm"}], ids=str)
def test_saved_with_a_scale_or_a_normalisation(tmp_path: Path, form: dict[str, Any]) -> None:
    sae, x = some_sae("jumprelu", **form), states()
    save(str(tmp_path), sae)
    same(load(str(tmp_path)), x, dense(sae, x), reconstruct(sae, x))


def test_half_precision_is_read_as_float32_with_the_same_numbers(tmp_path: Path) -> None:
    sae = some_sae(b_pre=torch.zeros(D)).to(dtype=torch.bfloat16)
    save(str(tmp_path), sae)
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "bfloat16"
    read = load(str(tmp_path))
    assert torch.equal(read.w_enc, sae.w_enc.float())
    assert digest(read) == digest(sae)


def test_any_of_the_files_names_the_folder(tmp_path: Path) -> None:
    save(str(tmp_path), some_sae())
    for url in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/cfg.json", f"{tmp_path}/sae_weights.safetensors"):
        assert load(url, name="other").name == "other"


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    save(str(tmp_path / "a"), some_sae())
    save(str(tmp_path / "b"), some_sae(seed=1))
    (tmp_path / "a" / "sae_weights.safetensors").write_bytes((tmp_path / "b" / "sae_weights.safetensors").read_bytes())
    with pytest.raises(ConceptError, match="do not belong together"):
        load(str(tmp_path / "a"))


def test_the_layer_of_our_own_file_is_not_to_be_overruled(tmp_path: Path) -> None:
    save(str(tmp_path), some_sae())
    assert load(str(tmp_path), layer=2).layer == 2
    with pytest.raises(ConceptError, match="is of layer 2, but layer=1 is given"):
        load(str(tmp_path), layer=1)


# SAELens


def saelens(architecture: str, **options: Any) -> Any:
    """A random SAE of SAELens' own classes."""
    files = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU"}
    its = sae_peers.module(f"sae_lens.saes.{architecture}_sae", "sae-lens")
    base = sae_peers.module("sae_lens.saes.sae", "sae-lens")
    config = getattr(its, f"{files[architecture]}SAEConfig")
    hook = options.pop("hook", "blocks.4.hook_resid_post")
    found = getattr(its, f"{files[architecture]}SAE")(
        config(d_in=D, d_sae=H, dtype="float64", metadata=base.SAEMetadata(hook_name=hook), **options)
    )
    randomise(found)
    if architecture == "jumprelu":
        found.threshold.data = found.threshold.data.abs()
    return found


NORMALISE = ("none", "layer_norm", "constant_norm_rescale")


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("standard", {}), ("topk", {"k": 5}), ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}), ("jumprelu", {})],
    ids=str,
)
def test_files_that_saelens_wrote(
    tmp_path: Path, architecture: str, options: dict[str, Any], twice: bool, normalise: str
) -> None:
    theirs = saelens(architecture, apply_b_dec_to_input=twice, normalize_activations=normalise, **options)
    theirs.save_model(tmp_path)
    sae, x = load(str(tmp_path)), states()
    assert sae.layer == 5
    with torch.no_grad():
        same(sae, x, theirs.encode(x), theirs(x))


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", FORMS)
def test_saelens_reads_what_we_wrote(tmp_path: Path, activation: str, normalise: str) -> None:
    base = sae_peers.module("sae_lens.saes.sae", "sae-lens")
    registry = sae_peers.module("sae_lens.registry", "sae-lens")
    if not registry.SAE_CLASS_REGISTRY:
        for name, kind in (("standard", "Standard"), ("topk", "TopK"), ("jumprelu", "JumpReLU")):
            its = sae_peers.module(f"sae_lens.saes.{name}_sae", "sae-lens")
            registry.register_sae_class(name, getattr(its, f"{kind}SAE"), getattr(its, f"{kind}SAEConfig"))
    sae, x = some_sae(activation, normalise=normalise), states()
    save(str(tmp_path), sae)
    theirs = base.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_pre"
    with torch.no_grad():
        same(sae, x, theirs.encode(x), theirs(x))
    theirs.save_model(tmp_path / "again")
    assert digest(load(str(tmp_path / "again"))) == digest(folded(sae))


def lens_tensors() -> dict[str, Tensor]:
    p = parts()
    return {"W_enc": p["e"].T, "b_enc": p["be"], "W_dec": p["d"], "b_dec": p["bd"]}


OLD = {"d_in": D, "d_sae": H, "hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "dtype": "torch.float32"}


@pytest.mark.parametrize(
    ("config", "twice", "active"),
    [
        ({}, True, torch.relu),
        ({"normalize_activations": False, "architecture": "standard"}, True, torch.relu),
        ({"normalize_activations": None, "apply_b_dec_to_input": False}, False, torch.relu),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}, True, top5),
        ({"architecture": "topk", "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}, True, top5),
    ],
    ids=["bare", "named", "unbiased", "activation_fn_str", "architecture"],
)
def test_configs_from_before_version_6(
    tmp_path: Path, config: dict[str, Any], twice: bool, active: Callable[[Tensor], Tensor]
) -> None:
    url = write(tmp_path / "x", {**OLD, **config}, lens_tensors(), "sae_weights.safetensors")
    sae, x = load(url), states()
    assert sae.layer == 3
    same(sae, x, *formula(x, twice, active))


def test_a_training_checkpoint_of_batch_topk(tmp_path: Path) -> None:
    config = {
        "architecture": "batchtopk",
        "rescale_acts_by_decoder_norm": True,
        "apply_b_dec_to_input": False,
        "metadata": {"hook_name": "blocks.0.hook_resid_pre"},
    }
    tensors = {**lens_tensors(), "topk_threshold": torch.tensor(1.5).double()}
    sae, x = load(write(tmp_path, config, tensors, "sae_weights.safetensors")), states()
    same(sae, x, *formula(x, False, lambda pre: torch.where(pre > 1.5, pre, 0.0), unit=True))


def test_an_sae_that_needs_a_scale(tmp_path: Path) -> None:
    config = {**OLD, "normalize_activations": "expected_average_only_in"}
    url = write(tmp_path, config, lens_tensors(), "sae_weights.safetensors")
    with pytest.raises(ConceptError, match="does not hold the factor"):
        load(url)
    x = states()
    r, out = formula(x * 0.5, True, torch.relu)
    same(load(url, scale=0.5), x, r, out / 0.5)
    assert load(url, scale=1.0).scale == 1.0


@pytest.mark.parametrize(
    ("name", "layer", "after"),
    [
        ("blocks.7.hook_resid_pre", 7, False),
        ("blocks.7.hook_resid_post", 8, True),
        ("layers.7", 8, True),
        ("model.layers.7", 8, True),
        ("transformer.h.0", 1, True),
    ],
)
def test_hooks_are_numbered_as_hidden_states(name: str, layer: int, after: bool) -> None:
    hook = hook_of(name)
    assert hook is not None
    assert (hook.layer, hook.after_block) == (layer, after)


@pytest.mark.parametrize(
    "name", ["blocks.7.hook_mlp_out", "blocks.7.attn.hook_z", "layers.7.mlp", "blocks.2.hook_resid_mid", "hook_embed"]
)
def test_places_that_are_no_state_between_blocks(tmp_path: Path, name: str) -> None:
    assert hook_of(name) is None
    url = write(tmp_path, {**OLD, "hook_point": name}, lens_tensors(), "sae_weights.safetensors")
    with pytest.raises(ConceptError, match=f"names '{name}', no place in the residual stream"):
        load(url)
    assert load(url, layer=3).layer == 3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "gated"}, "architecture 'gated', which is not read"),
        ({"normalize_activations": "covariance_whitening"}, "fold it into the weights with SAELens"),
        ({"d_sae": H + 1}, "cfg.json has d_sae=25, the weights 24"),
        ({"activation_fn": "tanh-relu"}, "architecture 'tanh-relu'"),
        ({"architecture": "topk"}, "k is None, expected a whole number"),
        ({"architecture": "jumprelu"}, "has no tensor 'threshold'"),
        ({"hook_point_head_index": 3}, "of a head"),
    ],
    ids=str,
)
def test_saelens_files_that_are_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    url = write(tmp_path, {**OLD, **config}, lens_tensors(), "sae_weights.safetensors")
    with pytest.raises(ConceptError, match=said):
        load(url)


def test_an_sae_scaled_after_training_is_refused(tmp_path: Path) -> None:
    ones = torch.ones(H).double()
    assert load(write(tmp_path / "a", OLD, {**lens_tensors(), "scaling_factor": ones}, "sae_weights.safetensors"))
    url = write(tmp_path / "b", OLD, {**lens_tensors(), "scaling_factor": 2 * ones}, "sae_weights.safetensors")
    with pytest.raises(ConceptError, match="scales its activations after training"):
        load(url)


# broken places


def test_places_without_an_sae(tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match="is no folder of an SAE"):
        load(str(tmp_path))
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(ConceptError, match="and no weights"):
        load(str(tmp_path))
    with pytest.raises(ConceptError, match="did you mean 'saelens'"):
        load(str(tmp_path), format="saelense")  # type: ignore[arg-type]
    with pytest.raises(StorageError):
        load(str(tmp_path), format="saelens")


def test_weights_without_a_config_or_broken(tmp_path: Path) -> None:
    save(str(tmp_path), some_sae())
    config = (tmp_path / "cfg.json").read_text()
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(ConceptError, match=r"no cfg\.json"):
        load(str(tmp_path))
    for text, said in (("{", "is broken"), ("[1]", "it holds list")):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ConceptError, match=said):
            load(str(tmp_path))
    (tmp_path / "cfg.json").write_text(config)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ConceptError, match="not a whole safetensors file"):
        load(str(tmp_path))


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    tensors = {**lens_tensors(), "b_dec": torch.full((D,), float("nan"))}
    with pytest.raises(ConceptError, match="holds NaN or infinite"):
        load(write(tmp_path, OLD, tensors, "sae_weights.safetensors"))
