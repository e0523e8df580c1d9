"""SAEs of two more projects: sparsify and dictionary_learning.

In: their configs and tensors. Out: what `sae_read.Read` holds. Knows no file. Their rules, as their own code has them:

**sparsify** (github.com/EleutherAI/sparsify): encoder.weight [h, d], encoder.bias, W_dec [h, d], b_dec. topk of the
ReLU. b_dec is taken away before the encoder and added after the decoder, whatever else the config says (only
transcoders, which are not read, leave it in). The folder's name is the hook: `layers.N` is the output of block N.

**dictionary_learning** (github.com/saprmarks/dictionary_learning): ae.pt and config.json, whose `dict_class` says:
    AutoEncoder          relu; `bias` before and after; on loading, the library makes decoder columns of length 1 (so
                         that activations are in units of the output): done here too
    AutoEncoderNew       relu; the decoder's bias after only
    AutoEncoderTopK      topk; b_dec before and after (its `threshold` is for another use)
    BatchTopKSAE, MatryoshkaBatchTopKSAE   above one threshold for all latents (-1: not set, plain ReLU); b_dec twice
    JumpReluAutoEncoder  a threshold for each latent; b_dec after only
nn.Linear weights are [out, in], the parameters W_enc and W_dec [d, h] and [h, d].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curate.concepts.sae_read import Hook, Read, Weights, hook_of, unit_decoder, whole_number
from curate.errors import ConceptError, near

_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)
_RESIDUAL = re.compile(r"resid_(?:(post|out)|(pre|in))(?:_|$)")


def from_sparsify(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: str, url: str) -> Read:
    """`folder`: the name of the folder that the files lie in.

    Raises:
        ConceptError: a transcoder, another activation than topk, or tensors that do not fit.
    """
    for key in ("transcode", "skip_connection", "signed"):
        if config.get(key):
            raise ConceptError(f"{url} has {key}=true in its cfg.json, which is not read: only plain autoencoders are")
    if (activation := config.get("activation", "topk")) != "topk":
        raise ConceptError(f"{url} has the activation {activation!r}; of sparsify's, topk alone is read")
    w = Weights(tensors, url)
    b_dec = w["b_dec"]
    return Read(
        w.matrix("encoder.weight"),
        w["encoder.bias"],
        w.matrix("W_dec"),
        b_pre=b_dec,
        b_dec=b_dec,
        activation="topk",
        k=whole_number(config.get("k"), "k", url),
        hook=hook_of(folder),
        place=folder,
        meta={"format": "sparsify"},
    )


def from_dictionary_learning(config: Mapping[str, Any], tensors: Mapping[str, Any], url: str) -> Read:
    """`config`: the whole of config.json, or empty where there is none.

    Raises:
        ConceptError: a class that is not read or cannot be told, or tensors that do not fit.
    """
    trainer = config.get("trainer") or {}
    w = Weights(tensors, url)
    name = _class(trainer.get("dict_class"), w)
    if "encoder.weight" in w:
        w_enc, b_enc, w_dec = w.matrix("encoder.weight"), w["encoder.bias"], w.matrix("decoder.weight", transpose=True)
    else:
        w_enc, b_enc, w_dec = w.matrix("W_enc", transpose=True), w["b_enc"], w.matrix("W_dec")
    b_dec = w[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")]
    twice = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    if name == "AutoEncoder":
        lengths = torch.linalg.vector_norm(w_dec, dim=1)
        if not torch.allclose(lengths, torch.ones_like(lengths)):
            w_enc, b_enc, w_dec = unit_decoder(w_enc, b_enc, w_dec)
    k, threshold = None, None
    if name == "AutoEncoderTopK":
        k = _k(trainer, tensors, url)
    elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = torch.ones_like(b_enc) * w["threshold"].to(b_enc)
    elif name == "JumpReluAutoEncoder":
        threshold = w["threshold"]
    place = trainer.get("submodule_name")
    meta = {"format": "dictionary_learning", "dict_class": name, "lm_name": trainer.get("lm_name")}
    return Read(
        w_enc,
        b_enc,
        w_dec,
        b_pre=b_dec if twice else torch.zeros_like(b_dec),
        b_dec=b_dec,
        activation="topk" if k is not None else "relu" if threshold is None else "jumprelu",
        k=k,
        threshold=threshold,
        hook=_hook(place, trainer.get("layer")),
        place=place,
        meta={key: value for key, value in meta.items() if value},
    )


def _class(given: str | None, w: Weights) -> str:
    """The form of the file; its tensors tell more surely than the config (one trainer writes another's name)."""
    if given is not None and given not in _CLASSES:
        raise ConceptError(f"{w.url} is a {given}, which is not read{near(given, _CLASSES)}")
    if "r_mag" in w:
        raise ConceptError(f"{w.url} is a gated autoencoder, which is not read")
    if "bias" in w:
        return "AutoEncoder"
    if "decoder.bias" in w:
        return "AutoEncoderNew"
    if given is not None:
        return given
    if "W_enc" in w:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in w else "JumpReluAutoEncoder"
    if "threshold" in w or "k" not in w:
        raise ConceptError(f"{w.url} may be of topk or of batch topk; put its config.json beside it, which says which")
    return "AutoEncoderTopK"


def _k(trainer: Mapping[str, Any], tensors: Mapping[str, Any], url: str) -> int:
    found = [whole_number(k, "k", url) for k in (tensors.get("k"), trainer.get("k")) if k is not None]
    if not found:
        raise ConceptError(f"{url} is of topk and says no k: neither ae.pt nor config.json has it")
    if found[0] != found[-1]:
        raise ConceptError(f"{url} has k={found[0]}, its config.json {found[-1]}: they belong not together")
    return found[0]


def _hook(place: Any, layer: Any) -> Hook | None:
    if not isinstance(place, str) or not isinstance(layer, int) or not (m := _RESIDUAL.search(place)):
        return None
    return Hook(place, layer + (m[1] is not None), m[1] is not None)
