"""Files of sparsify and dictionary_learning, against their own code and against plain formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curate.concepts.sae import dense, reconstruct
from curate.concepts.sae_files import load
from curate.errors import ConceptError
from tests.concepts import sae_peers
from tests.concepts.sae_layouts import formula, parts, randomise, same, top5, write
from tests.concepts.test_sae import D, H, states

# sparsify


def sparsify_tensors() -> dict[str, Tensor]:
    p = parts()
    return {"encoder.weight": p["e"], "encoder.bias": p["be"], "W_dec": p["d"], "b_dec": p["bd"]}


@pytest.mark.parametrize("extra", [{}, {"normalize_decoder": True, "num_latents": H, "multi_topk": False}], ids=str)
def test_sparsify_by_its_formula(tmp_path: Path, extra: dict[str, Any]) -> None:
    config = {"d_in": D, "k": 5, "expansion_factor": 3, **extra}
    sae, x = load(write(tmp_path / "layers.4", config, sparsify_tensors(), "sae.safetensors")), states()
    assert (sae.layer, sae.name) == (5, "layers_4")
    same(sae, x, *formula(x, True, top5))


def test_files_that_sparsify_wrote(tmp_path: Path) -> None:
    coder = sae_peers.module("sparsify.sparse_coder", "eai-sparsify")
    config = sae_peers.module("sparsify.config", "eai-sparsify").SparseCoderConfig(k=5, num_latents=H)
    theirs = coder.SparseCoder(D, config, dtype=torch.float64)
    randomise(theirs)
    theirs.save_to_disk(tmp_path / "layers.4")
    sae, x = load(str(tmp_path / "layers.4")), states()
    with torch.no_grad():
        values, indices, _ = theirs.encode(x)
        r = torch.zeros(len(x), H).double().scatter(1, indices, values)
        torch.testing.assert_close(dense(sae, x), r)
        # Its decoder needs a fast kernel on some machines; the sum itself is written out.
        torch.testing.assert_close(reconstruct(sae, x), r @ theirs.W_dec + theirs.b_dec)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"transcode": True}, "has transcode=true"),
        ({"skip_connection": True}, "has skip_connection=true"),
        ({"signed": True}, "has signed=true"),
        ({"activation": "groupmax"}, "topk alone is read"),
        ({"k": "many"}, "k is 'many', expected a whole number"),
    ],
    ids=str,
)
def test_sparsify_files_that_are_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    url = write(tmp_path / "layers.4", {"d_in": D, "k": 5, **config}, sparsify_tensors(), "sae.safetensors")
    with pytest.raises(ConceptError, match=said):
        load(url)


def test_a_sparsify_folder_of_another_place_needs_a_layer(tmp_path: Path) -> None:
    config = {"d_in": D, "k": 5}
    url = write(tmp_path / "layers.4.mlp", config, sparsify_tensors(), "sae.safetensors")
    with pytest.raises(ConceptError, match=r"names 'layers.4.mlp', no place"):
        load(url)


# dictionary_learning


def linear_tensors(bias: str) -> dict[str, Tensor]:
    p = parts()
    return {"encoder.weight": p["e"], "encoder.bias": p["be"], "decoder.weight": p["d"].T, bias: p["bd"]}


def parameter_tensors() -> dict[str, Tensor]:
    p = parts()
    return {"W_enc": p["e"].T, "b_enc": p["be"], "W_dec": p["d"], "b_dec": p["bd"]}


def write_ae(folder: Path, trainer: dict[str, Any] | None, state: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    if trainer is not None:
        where = {"layer": 3, "submodule_name": "resid_post_layer_3", "lm_name": "tiny"}
        (folder / "config.json").write_text(json.dumps({"trainer": {**where, **trainer}, "buffer": {"io": "out"}}))
    return str(folder)


_K = {"k": torch.tensor(5), "threshold": torch.tensor(-1.0)}
_T = torch.linspace(0, 2, H).double()


@pytest.mark.parametrize(
    ("name", "state", "twice", "active", "unit"),
    [
        ("AutoEncoder", linear_tensors("bias"), True, torch.relu, True),
        ("AutoEncoder", linear_tensors("decoder.bias"), False, torch.relu, False),  # as one of its trainers has it
        ("AutoEncoderNew", linear_tensors("decoder.bias"), False, torch.relu, False),
        ("AutoEncoderTopK", {**linear_tensors("b_dec"), **_K}, True, top5, False),
        ("AutoEncoderTopK", {**linear_tensors("b_dec"), "k": torch.tensor(5)}, True, top5, False),
        ("BatchTopKSAE", {**linear_tensors("b_dec"), **_K}, True, torch.relu, False),
        (
            "BatchTopKSAE",
            {**linear_tensors("b_dec"), **_K, "threshold": torch.tensor(0.7)},
            True,
            lambda pre: torch.where(pre > torch.tensor(0.7), pre, 0.0),
            False,
        ),
        (
            "MatryoshkaBatchTopKSAE",
            {**parameter_tensors(), **_K, "threshold": torch.tensor(0.7), "group_sizes": torch.tensor([8, 16])},
            True,
            lambda pre: torch.where(pre > torch.tensor(0.7), pre, 0.0),
            False,
        ),
        (
            "JumpReluAutoEncoder",
            {**parameter_tensors(), "threshold": _T},
            False,
            lambda pre: torch.where(pre > _T, pre, 0.0),
            False,
        ),
    ],
)
def test_dictionaries_by_their_formulas(
    tmp_path: Path,
    name: str,
    state: dict[str, Tensor],
    twice: bool,
    active: Callable[[Tensor], Tensor],
    unit: bool,
) -> None:
    sae, x = load(write_ae(tmp_path / "trainer_0", {"dict_class": name, "k": 5}, state)), states()
    assert (sae.layer, sae.name) == (4, "trainer_0")
    same(sae, x, *formula(x, twice, active, unit))


@pytest.mark.parametrize(
    ("module", "name", "k"),
    [
        ("dictionary", "AutoEncoder", None),
        ("dictionary", "AutoEncoderNew", None),
        ("dictionary", "JumpReluAutoEncoder", None),
        ("trainers.top_k", "AutoEncoderTopK", 5),
        ("trainers.batch_top_k", "BatchTopKSAE", 5),
    ],
)
def test_files_that_dictionary_learning_wrote(tmp_path: Path, module: str, name: str, k: int | None) -> None:
    its = sae_peers.module(f"dictionary_learning.{module}", "dictionary-learning")
    theirs = getattr(its, name)(D, H, *([] if k is None else [k])).double()
    randomise(theirs)
    if name == "JumpReluAutoEncoder":
        theirs.threshold.data = theirs.threshold.data.abs()
    if name == "BatchTopKSAE":
        theirs.threshold = torch.tensor(0.6)
    url = write_ae(tmp_path, {"dict_class": name} if k is None else {"dict_class": name, "k": k}, theirs.state_dict())
    if name == "AutoEncoder":  # as its loader does
        norms = theirs.decoder.weight.norm(dim=0)
        theirs.decoder.weight.data /= norms
        theirs.encoder.weight.data *= norms[:, None]
        theirs.encoder.bias.data *= norms
    sae, x = load(url), states()
    with torch.no_grad():
        same(sae, x, theirs.encode(x), theirs(x))


@pytest.mark.parametrize(
    ("trainer", "state", "said"),
    [
        ({"dict_class": "GatedAutoEncoder"}, linear_tensors("b_dec"), "is a GatedAutoEncoder, which is not read"),
        ({}, {**linear_tensors("b_dec"), "r_mag": torch.zeros(H)}, "gated autoencoder"),
        (None, {**linear_tensors("b_dec"), **_K}, "put its config.json beside it"),
        ({"dict_class": "AutoEncoderTopK"}, linear_tensors("b_dec"), "says no k"),
        ({"dict_class": "AutoEncoderTopK", "k": 4}, {**linear_tensors("b_dec"), **_K}, "has k=5, its config.json 4"),
        ({"submodule_name": "mlp_out_3"}, linear_tensors("bias"), "names 'mlp_out_3', no place"),
        ({"submodule_name": None}, linear_tensors("bias"), "does not name a place"),
        ({}, [torch.zeros(3)], "holds list, expected the state"),
        ({}, {**linear_tensors("bias"), "bias": torch.zeros(D, dtype=torch.long)}, "bias is a tensor of torch.int64"),
        ({}, {**linear_tensors("bias"), "encoder.weight": torch.zeros(H)}, "expected a matrix"),
    ],
)
def test_dictionaries_that_are_refused(tmp_path: Path, trainer: dict[str, Any] | None, state: Any, said: str) -> None:
    with pytest.raises(ConceptError, match=said):
        load(write_ae(tmp_path, trainer, state))


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_a_dictionary_that_would_run_code_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConceptError, match=r"can run code\. Save its state_dict"):
        load(write_ae(tmp_path, {}, {"bias": Surprise()}))
    assert "code ran" not in capsys.readouterr().out
