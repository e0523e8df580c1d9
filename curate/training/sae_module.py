"""The weights of an SAE while it learns: their beginning, the forward pass, and what keeps decoder rows at length 1.

In: states x [n, d], scaled so that most lie √d from their centre. Out: their reconstructions and latents, and at the
end an SAE for states as they are. One bias is subtracted before the encoder and added after the decoder (paper B,
eq. 7–8). Knows no loss and no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from curate.concepts.decode import decode_sparse
from curate.concepts.sae import SAE
from curate.errors import TrainingError
from curate.training.sae_loss import jump_relu
from curate.training.sae_settings import SaeSettings

_ROUNDS, _CLOSE = 100, 1e-6  # of the search for a geometric median


@dataclass(frozen=True)
class Beginning:
    """What is learnt of the states before training: their centre [d], and the scale that puts most at √d from it."""

    centre: Float[Tensor, " d"]
    scale: float


@dataclass(frozen=True)
class Pass:
    """One forward pass. `pre`: before the activation, [n, h]. `values`, `indices`: active latents; where every latent
    is computed (relu, jumprelu) `values` is [n, h] and `indices` None."""

    rebuilt: Float[Tensor, "n d"]
    pre: Float[Tensor, "n h"]
    values: Float[Tensor, "n slots"]
    indices: Int[Tensor, "n slots"] | None

    def fired(self, latents: int) -> Bool[Tensor, " h"]:
        """Which latents are active in any of the states."""
        if self.indices is None:
            return (self.values > 0).any(0)
        out = torch.zeros(latents, dtype=torch.bool, device=self.values.device)
        out[self.indices[self.values > 0]] = True
        return out

    def active(self) -> Float[Tensor, " n"]:
        """Number of active latents, per state."""
        return (self.values > 0).sum(-1).float()


def geometric_median(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the states, by Weiszfeld's steps: few far ones do not move it."""
    point = x.mean(0)
    for _ in range(_ROUNDS):
        near = 1 / (x - point).norm(dim=-1).clamp(min=1e-12)
        new = (near[:, None] * x).sum(0) / near.sum()
        moved = float((new - point).norm())
        point = new
        if moved <= _CLOSE * (1e-12 + float(new.norm())):
            break
    return point


def begin(sample: Float[Tensor, "n d"], settings: SaeSettings, layer: int) -> Beginning:
    """Centre and scale of a sample of states.

    Raises:
        TrainingError: states that are not finite, or all alike.
    """
    x = sample.double()
    if not bool(torch.isfinite(x).all()):
        raise TrainingError(
            f"the activations of layer {layer} hold NaN or infinite numbers: the model overflows in its precision "
            f"(model.dtype), or the adapter is broken"
        )
    centre = geometric_median(x) if settings.bias == "median" else x.mean(0)
    usual = float((x - centre).norm(dim=-1).median())
    if not usual > 0:
        raise TrainingError(f"the activations of layer {layer} are all alike; there is nothing to learn from them")
    return Beginning(centre.float(), math.sqrt(x.shape[1]) / usual)


class Autoencoder(nn.Module):
    """W_enc, b_enc, W_dec, the bias and (jumprelu) log θ, float32. Decoder rows begin as random directions, the encoder
    as their transpose."""

    centre: Tensor

    def __init__(self, settings: SaeSettings, beginning: Beginning, generator: torch.Generator) -> None:
        super().__init__()
        d = beginning.centre.shape[0]
        self.settings, self.beginning = settings, beginning
        rows = F.normalize(torch.randn((settings.latents, d), generator=generator), dim=-1)
        self.w_dec = nn.Parameter(rows)
        self.w_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(settings.latents))
        self.bias = nn.Parameter(beginning.centre * beginning.scale)
        self.register_buffer("centre", beginning.centre * beginning.scale, persistent=False)
        if settings.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((settings.latents,), math.log(settings.threshold)))

    def forward(self, x: Float[Tensor, "n d"]) -> Pass:
        s = self.settings
        # The bias learns by a term that is 0: by x − bias it would take every state's gradient, a third product.
        fixed = self.bias.detach()
        pre = F.linear(x - fixed, self.w_enc, self.b_enc - self.w_enc @ (self.bias - fixed))
        pre = pre.to(self.w_dec.dtype)  # not bfloat16, as in autocast
        if s.activation == "topk":
            values, indices = pre.topk(s.k, dim=-1, sorted=False)
            values = torch.relu(values)
            return Pass(decode_sparse(values, indices, self.w_dec) + self.bias, pre, values, indices)
        r = torch.relu(pre) if s.activation == "relu" else jump_relu(pre, self.thresholds(), s.bandwidth)
        return Pass(r @ self.w_dec + self.bias, pre, r, None)

    def thresholds(self) -> Float[Tensor, " h"]:
        return self.log_threshold.exp()

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the length of a row."""
        if self.w_dec.grad is not None:
            along = (self.w_dec.grad * self.w_dec).sum(-1, keepdim=True)
            self.w_dec.grad -= along * self.w_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Rows of length 1."""
        self.w_dec.copy_(F.normalize(self.w_dec, dim=-1))

    def to_sae(self, layer: int, name: str, model: Mapping[str, Any], meta: Mapping[str, Any]) -> SAE:
        """The SAE for states as they are. As σ is homogeneous (σ(p/s) = σ(p)/s, thresholds likewise), the scale goes
        into the biases: r becomes r/s, and W_enc, W_dec stay."""
        s = self.beginning.scale
        host = {name: value.detach().cpu().clone() for name, value in self.named_parameters()}
        jump = self.settings.activation == "jumprelu"
        return SAE(
            w_enc=host["w_enc"],
            b_enc=host["b_enc"] / s,
            w_dec=host["w_dec"],
            b_pre=host["bias"] / s,
            b_dec=host["bias"] / s,
            activation=self.settings.activation,
            k=self.settings.k if self.settings.activation == "topk" else None,
            threshold=host["log_threshold"].exp() / s if jump else None,
            layer=layer,
            name=name,
            model=dict(model),
            meta=dict(meta),
        )
