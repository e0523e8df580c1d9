"""SAELens' form of an SAE: cfg.json and sae_weights.safetensors (github.com/decoderesearch/SAELens).

In: its config and tensors, of version 6 or before. Out: what `sae_read.Read` holds; and the way back. Knows no file.

    W_enc [d, h], W_dec [h, d], b_enc, b_dec; threshold [h] for jumprelu
    apply_b_dec_to_input   b_dec is taken away before the encoder too (true before version 6)
    normalize_activations  none; layer_norm and constant_norm_rescale: of every state, at run time;
                           expected_average_only_in: one factor for all, which is folded into the weights of a finished
                           SAE (and then reads none) and is not in the file of an unfinished one
    rescale_acts_by_decoder_norm   topk chooses by activation times the length of the decoder's row; folded here
    batchtopk              of a training's checkpoint: jumprelu with one threshold for all, topk_threshold
A jumprelu latent is on where its preactivation is above the threshold and above 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curate.concepts.concept import as_json
from curate.concepts.sae import SAE, Activation, Normalise, digest
from curate.concepts.sae_read import Read, Weights, hook_of, unit_decoder, whole_number
from curate.errors import ConceptError, near

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OURS = "curate"  # the key of our own facts in a config's metadata
_VERSION = "6.0.0"  # whose layout is written
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_ACTIVATION: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
_NORMALISE: dict[str, Normalise] = {
    "none": "none",
    "expected_average_only_in": "none",
    "constant_norm_rescale": "constant_norm",
    "layer_norm": "layer_norm",
}
_FACTS = ("model_name", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id", "sae_lens_version")


def to_saelens(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """cfg.json and the tensors, of an SAE that is `sae.folded`. Our own facts are in metadata.curate.

    The hook is `blocks.l.hook_resid_pre`, which is hidden_states[l] exactly, but for l = L, which TransformerLens has
    no hook for.
    """
    names = {v: k for k, v in _NORMALISE.items() if k != "expected_average_only_in"}
    config: dict[str, Any] = {
        "architecture": {"relu": "standard"}.get(sae.activation, sae.activation),
        "d_in": sae.width,
        "d_sae": sae.latents,
        "dtype": str(sae.w_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": bool(sae.b_pre.any()),
        "normalize_activations": names[sae.normalise],
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "model_name": sae.model.get("name"),
            "hook_name": f"blocks.{sae.layer}.hook_resid_pre",
            OURS: {
                "name": sae.name,
                "layer": sae.layer,
                "model": as_json(sae.model),
                "meta": as_json(sae.meta),
                "digest": digest(sae),
            },
        },
    }
    tensors = {"W_enc": sae.w_enc.T, "b_enc": sae.b_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    if sae.activation == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    return config, {name: t.detach().to("cpu", sae.w_enc.dtype).contiguous() for name, t in tensors.items()}


def from_saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor], url: str) -> Read:
    """
    Raises:
        ConceptError: an architecture, a normalisation or a place that is none of ours, or tensors that do not fit.
    """
    config = _flat(config)
    architecture = config.get("architecture", "standard")
    if architecture not in _ACTIVATION:
        raise ConceptError(
            f"{url} is an SAE of the architecture {architecture!r}, which is not read{near(architecture, _ACTIVATION)}"
        )
    normalise = config.get("normalize_activations") or "none"
    if normalise not in _NORMALISE:
        raise ConceptError(
            f"{url} has normalize_activations={normalise!r}, which is not read; fold it into the weights with SAELens "
            f"first, or take one of {', '.join(_NORMALISE)}"
        )
    w = Weights(tensors, url)
    w_enc, b_enc, w_dec, b_dec = w.matrix("W_enc", transpose=True), w["b_enc"], w.matrix("W_dec"), w["b_dec"]
    for key, found in (("d_sae", w_enc.shape[0]), ("d_in", w_enc.shape[1])):
        if key in config and config[key] != found:
            raise ConceptError(
                f"{url}: cfg.json has {key}={config[key]}, the weights {found}; they belong not together"
            )
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        if key in w and not torch.equal(w[key], torch.ones_like(w[key])):
            raise ConceptError(f"{url} scales its activations after training ({key}), which is not read")
    if config.get("rescale_acts_by_decoder_norm"):
        w_enc, b_enc, w_dec = unit_decoder(w_enc, b_enc, w_dec)
    place = config.get("hook_name")
    if config.get("hook_head_index") is not None or config.get("hook_name_out") not in (None, place):
        place = f"{place} (of a head, or a transcoder)"
    read = Read(
        w_enc,
        b_enc,
        w_dec,
        b_pre=b_dec if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec),
        b_dec=b_dec,
        activation=_ACTIVATION[architecture],
        normalise=_NORMALISE[normalise],
        unscaled=normalise == "expected_average_only_in",
        hook=hook_of(place),
        place=place,
        meta={"format": "saelens", "architecture": architecture, **{k: config[k] for k in _FACTS if config.get(k)}},
    )
    if architecture == "topk":
        return replace(read, k=whole_number(config.get("k"), "k", url))
    return replace(read, threshold=_threshold(w, b_enc)) if read.activation == "jumprelu" else read


def _threshold(w: Weights, b_enc: Tensor) -> Tensor:
    if "log_threshold" in w:  # training checkpoints of early versions
        return w["log_threshold"].exp()
    if "topk_threshold" in w:  # training checkpoints of batchtopk
        return torch.ones_like(b_enc) * w["topk_threshold"].to(b_enc)
    return w["threshold"]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of version 6, those of its metadata among them, from a config of any version."""
    if isinstance(config.get("metadata"), Mapping):
        return {**config["metadata"], **{k: v for k, v in config.items() if k != "metadata"}}
    flat = {_OLD_NAMES.get(k, k): v for k, v in config.items()}
    activation = flat.get("activation_fn", "relu")
    if activation == "topk":
        flat |= {"architecture": "topk", "k": (flat.get("activation_fn_kwargs") or {}).get("k", flat.get("k"))}
    elif activation != "relu":
        flat["architecture"] = activation
    if isinstance(flat.get("normalize_activations"), bool):
        flat["normalize_activations"] = "expected_average_only_in" if flat["normalize_activations"] else "none"
    return flat
