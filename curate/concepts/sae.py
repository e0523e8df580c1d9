"""Sparse autoencoder: a state of the residual stream as a few active latents, and back (METHODS §5).

In: states x [n, d] of one layer. Out: sparse activations r, reconstructions x̃. Knows no model and no file.

    r = σ(W_enc(s·x − b_pre) + b_enc)        x̃ = (W_dec r + b_dec)/s

σ is one of
    relu      max(p, 0)
    topk      the k largest p of a state, and of these the positive ones
    jumprelu  p where p > threshold (a number a latent) and p > 0, else 0
s is a number (`scale`) or comes from each state (`normalise`, as SAELens has it): constant_norm takes s = √d/‖x‖, and
layer_norm takes the state's mean away and divides by its standard deviation; decoding undoes both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curate.concepts.concept import same_model, title
from curate.concepts.decode import decode_sparse
from curate.errors import ConceptError, near

Activation = Literal["topk", "relu", "jumprelu"]
Normalise = Literal["none", "constant_norm", "layer_norm"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_EPS = 1e-5  # of SAELens' layer norm; it is not used on the way back


@dataclass(frozen=True, eq=False)
class Sparse:
    """Active latents of n states: `values` [n, k] ≥ 0 and which latents they are of, `indices` [n, k].

    A slot that is not used has value 0 and index 0. `mean`, `gain` [n, 1]: what `normalise` took from each state and
    decoding gives back (x̃ = gain·x̃' + mean); None for SAEs without it. `replace(sparse, values=…)` keeps them.
    """

    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    mean: Float[Tensor, "n 1"] | None = None
    gain: Float[Tensor, "n 1"] | None = None

    @property
    def active(self) -> Bool[Tensor, "n k"]:
        """Which slots are used."""
        return self.values > 0


@dataclass(frozen=True, eq=False)
class SAE:
    """Weights of a sparse autoencoder with h latents for states of width d, and where it belongs.

    `layer` is that of `hidden_states` (0 = embeddings, L = after the final norm). `model` the identity of the model
    whose states it was made from (name, digest, adapter; empty when a file does not say). `name` becomes part of the
    names of columns. `meta`: JSON values only.

    Raises:
        ConceptError: on construction: shapes that do not fit, NaN or infinite weights, a k or a threshold that is
            missing, out of range or given where none is used, an unknown activation, a name that cannot be used.
    """

    w_enc: Float[Tensor, "h d"]
    b_enc: Float[Tensor, " h"]
    w_dec: Float[Tensor, "h d"]
    b_pre: Float[Tensor, " d"]
    b_dec: Float[Tensor, " d"]
    activation: Activation
    layer: int
    name: str
    k: int | None = None
    threshold: Float[Tensor, " h"] | None = None
    scale: float = 1.0
    normalise: Normalise = "none"
    model: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConceptError(
                f"an SAE cannot be called {self.name!r}: the name becomes part of a column's name, so use letters, "
                f"digits, '-' and '_'"
            )
        who = f"the SAE {self.name!r}"
        for what, value, choices in (
            ("activation", self.activation, get_args(Activation)),
            ("normalisation", self.normalise, get_args(Normalise)),
        ):
            if value not in choices:
                raise ConceptError(f"{who} has the {what} {value!r}{near(value, choices)}")
        if self.w_enc.ndim != 2 or 0 in self.w_enc.shape:
            raise ConceptError(f"{who}: w_enc has the shape {list(self.w_enc.shape)}, expected [latents, width]")
        h, d = self.w_enc.shape
        shapes = {"b_enc": (h,), "w_dec": (h, d), "b_pre": (d,), "b_dec": (d,), "threshold": (h,)}
        for what, tensor in self.tensors().items():
            if what in shapes and tuple(tensor.shape) != shapes[what]:
                raise ConceptError(
                    f"{who}: {what} has the shape {list(tensor.shape)}, expected {list(shapes[what])} beside w_enc "
                    f"{[h, d]} (latents, width)"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConceptError(
                    f"{who}: {what} holds NaN or infinite numbers ({int((~torch.isfinite(tensor)).sum())} of "
                    f"{tensor.numel()}). Its training diverged or its file is broken: train or fetch it again."
                )
        if (self.activation == "topk") != (self.k is not None):
            raise ConceptError(f"{who} has k={self.k} and the activation {self.activation!r}; topk alone takes a k")
        if self.k is not None and not 1 <= self.k <= h:
            raise ConceptError(f"{who} has k={self.k} with {h} latents; k is from 1 to {h}")
        if (self.activation == "jumprelu") != (self.threshold is not None):
            raise ConceptError(f"{who}: the activation {self.activation!r} needs a threshold exactly if it is jumprelu")
        if not 0 < self.scale < float("inf"):
            raise ConceptError(f"{who} has the scale {self.scale}; it must be above 0")
        if self.normalise != "none" and self.scale != 1.0:
            raise ConceptError(f"{who} has both a scale and the normalisation {self.normalise!r}; it takes one")
        if self.layer < 0:
            raise ConceptError(f"{who} has the layer {self.layer}; layers are numbered from 0 (the embeddings)")

    @property
    def latents(self) -> int:
        """h, the number of latents."""
        return int(self.w_enc.shape[0])

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return int(self.w_enc.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name; `threshold` only where there is one."""
        names = ("w_enc", "b_enc", "w_dec", "b_pre", "b_dec", "threshold")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same with its weights on `device` and of `dtype` (None: as they are)."""
        moved: dict[str, Any] = {name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()}
        # Unchanged ones need no second look at every number.
        return self if all(t is getattr(self, name) for name, t in moved.items()) else replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Latent:
    """One latent of an SAE, by its number.

    Raises:
        ConceptError: on construction: there is no such latent.
    """

    sae: SAE
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.sae.latents:
            raise ConceptError(
                f"the SAE {self.sae.name!r} has the latents 0 to {self.sae.latents - 1}; there is no latent "
                f"{self.index}"
            )


def digest(sae: SAE) -> str:
    """Hash of what changes a number: name, layer, model, form and weights (as float32). Not how it was made."""
    model = [sae.model.get(k) for k in ("digest", "adapter")]
    head = [sae.name, sae.layer, sae.activation, sae.k, sae.scale, sae.normalise, model, list(sae.w_enc.shape)]
    h = hashlib.blake2b(json.dumps(head).encode(), digest_size=16)
    for name, tensor in sae.tensors().items():
        h.update(name.encode())
        # Plus zero: one bit pattern for zero; and one byte order, so that every machine gets the same digest.
        h.update((tensor.detach().to("cpu", torch.float32) + 0.0).contiguous().numpy().astype("<f4").data)
    return h.hexdigest()


def folded(sae: SAE) -> SAE:
    """The same function in the form of SAELens' files: no scale, and b_pre that is zero or b_dec.

    Exact where that is so already; else equal to rounding.
    """
    if sae.scale != 1.0:
        s = sae.scale
        # W_enc(s·x − b) = s·W_enc(x − b/s); and (W_dec r + b)/s.
        sae = replace(
            sae, w_enc=sae.w_enc * s, b_pre=sae.b_pre / s, w_dec=sae.w_dec / s, b_dec=sae.b_dec / s, scale=1.0
        )
    if torch.equal(sae.b_pre, sae.b_dec) or not bool(sae.b_pre.any()):
        return sae
    return replace(sae, b_enc=sae.b_enc - sae.w_enc @ sae.b_pre, b_pre=torch.zeros_like(sae.b_pre))


def check_width(sae: SAE, width: int, model: str = "the model") -> None:
    """Raise ConceptError unless the SAE is of this width."""
    if sae.width != width:
        raise ConceptError(
            f"the SAE {sae.name!r} has width {sae.width}, {model} has {width}: it was made for another model"
        )


def check_fits(sae: SAE, identity: Mapping[str, Any], allow_other_model: bool = False) -> None:
    """Check an SAE against the model that it is to be used with.

    Args:
        identity: of the model (models.load.identity): name, layers, width, digest, adapter.
        allow_other_model: take one that was made from another model of the same shape.

    Raises:
        ConceptError: another width, a layer that the model does not have or that means something else there, or
            another model.
    """
    who, there, layers = f"the SAE {sae.name!r}", title(identity), int(identity["layers"])
    check_width(sae, int(identity["width"]), there)
    if sae.layer > layers:
        raise ConceptError(f"{who} is of layer {sae.layer}; {there} has the layers 0 to {layers}")
    if sae.layer == layers and sae.meta.get("before_final_norm"):
        raise ConceptError(
            f"{who} reads {sae.meta.get('hook')}, the last block's output before the final norm; layer {layers} of "
            f"{there} is the state after it. Choose an SAE of a lower layer."
        )
    if not allow_other_model and not same_model(sae.model, identity):
        raise ConceptError(
            f"{who} was made from {title(sae.model)}, but the model to use it with is {there}. Latents of one model "
            f"mean nothing in another, even of equal width. Train the SAE on this model, or set "
            f"allow_other_model=true if the two share their base."
        )


def preactivations(sae: SAE, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n h"]:
    """W_enc(s·x − b_pre) + b_enc, before σ; in the SAE's precision.

    Raises:
        ConceptError: the states have another width.
    """
    return _pre(sae, _normalised(sae, x)[0])


def dense(sae: SAE, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n h"]:
    """r, all latents of every state, zeros included. Differentiable (not in the threshold)."""
    return _dense(sae, preactivations(sae, x))


def activations(sae: SAE, x: Float[Tensor, "n d"], latents: Sequence[int]) -> Float[Tensor, "n m"]:
    """r of some latents only, in their order; others are computed only where they matter (topk)."""
    chosen = torch.as_tensor(list(latents), dtype=torch.long, device=sae.w_enc.device)
    if sae.activation == "topk":
        return dense(sae, x)[:, chosen]
    threshold = None if sae.threshold is None else sae.threshold[chosen]
    states = _normalised(sae, x)[0] - sae.b_pre
    return _above(torch.nn.functional.linear(states, sae.w_enc[chosen], sae.b_enc[chosen]), threshold)


def encode(sae: SAE, x: Float[Tensor, "n d"]) -> Sparse:
    """r as its active latents: k slots a state for topk, else as many as the state with the most needs (at least 1).

    Slots are in no particular order. Differentiable in x and the weights (not in the threshold).
    """
    states, mean, gain = _normalised(sae, x)
    pre = _pre(sae, states)
    if sae.activation == "topk":
        assert sae.k is not None
        values, indices = torch.topk(pre, sae.k, dim=-1, sorted=False)
        values = torch.relu(values)
    else:
        r = _dense(sae, pre)
        most = int((r > 0).sum(-1).max()) if r.shape[0] else 0
        values, indices = torch.topk(r, max(most, 1), dim=-1, sorted=False)
    return Sparse(values, torch.where(values > 0, indices, 0), mean, gain)


def encode_flops(sae: SAE, tokens: int) -> float:
    """FLOPs of `encode` on so many states; `decode` reads the active latents' rows alone, which is little beside it."""
    return 2.0 * sae.latents * sae.width * tokens


def decode(sae: SAE, sparse: Sparse) -> Float[Tensor, "n d"]:
    """x̃ = (W_dec r + b_dec)/s. Differentiable in the values any number of times, and by forward-mode AD.

    Raises:
        ConceptError: an SAE that normalises each state, and activations that do not carry what was taken from it.
    """
    out = decode_sparse(sparse.values.to(sae.w_dec.dtype), sparse.indices, sae.w_dec) + sae.b_dec
    if sae.normalise == "none":
        return out / sae.scale if sae.scale != 1.0 else out
    if sparse.gain is None:
        raise ConceptError(
            f"the SAE {sae.name!r} normalises each state ({sae.normalise}); decode what encode gave, or "
            f"replace(sparse, values=…) of it"
        )
    out = out * sparse.gain
    return out if sparse.mean is None else out + sparse.mean


def reconstruct(sae: SAE, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """x̃ of states x."""
    return decode(sae, encode(sae, x))


def keep(sparse: Sparse, chosen: Bool[Tensor, " h"]) -> Sparse:
    """The same with every latent that is not `chosen` at 0."""
    return replace(sparse, values=torch.where(chosen[sparse.indices], sparse.values, 0.0))


def _normalised(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The states as the encoder takes them, in the SAE's precision, and what undoes it."""
    check_width(sae, x.shape[-1], "the model whose states these are")
    x = x.to(sae.w_enc.dtype)
    if sae.normalise == "constant_norm":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / sae.width**0.5
        return x / norm, None, norm
    if sae.normalise == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        deviation = (x - mean).std(-1, keepdim=True)
        return (x - mean) / (deviation + _EPS), mean, deviation
    return (x * sae.scale if sae.scale != 1.0 else x), None, None


def _pre(sae: SAE, states: Tensor) -> Tensor:
    return torch.nn.functional.linear(states - sae.b_pre, sae.w_enc, sae.b_enc)


def _dense(sae: SAE, pre: Tensor) -> Tensor:
    if sae.activation == "topk":
        assert sae.k is not None
        values, indices = torch.topk(torch.relu(pre), sae.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values)
    return _above(pre, sae.threshold)


def _above(pre: Tensor, threshold: Tensor | None) -> Tensor:
    r = torch.relu(pre)
    return r if threshold is None else torch.where(pre > threshold, r, 0.0)
