"""Terms of the loss that an SAE is trained by (METHODS §5; Gao et al. 2024; Rajamanoharan et al. 2024).

In: states x [n, d], what the SAE makes of them, its latents. Out: numbers that autograd can go through. All terms are
without units: errors are shares of a variance, so that one weight serves every layer and model. Knows no optimizer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curate.concepts.decode import decode_sparse

ErrorKind = Literal["token", "batch"]
_LEAST = 1e-2  # of the usual squared distance from the centre: states near it are divided by so much at least


def spread(x: Float[Tensor, "n d"], centre: Float[Tensor, " d"], kind: ErrorKind, usual: float) -> Float[Tensor, " n"]:
    """What a state's squared error is divided by.

    batch: the variance of the batch, Σ‖x − x̄‖²/n, one number for all (the normalised MSE of Gao et al.).
    token: the state's own ‖x − centre‖². A few states of a language model (its first token, above all) are a hundred
    times longer than the rest; the first form is then their error alone, this one counts every token alike.

    Args:
        usual: the squared distance of most states, so that one at the centre is not divided by nothing.
    """
    if kind == "batch":
        variance = (x - x.mean(0)).square().sum(-1).mean().clamp(min=_LEAST * usual)
        return variance.expand(x.shape[0])
    return (x - centre).square().sum(-1).clamp(min=_LEAST * usual)


def reconstruction(
    x: Float[Tensor, "n d"], rebuilt: Float[Tensor, "n d"], of: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """‖x − x̃‖² as a share of `of` (see `spread`), per state; its mean is the loss."""
    return (x - rebuilt).square().sum(-1) / of


def l1(r: Float[Tensor, "n slots"], of: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Σ_j r_j / √of: the L1 penalty for decoder rows of length 1, relative to the length of the state."""
    return r.sum(-1) / of.sqrt()


def auxiliary(
    residual: Float[Tensor, "n d"],
    pre: Float[Tensor, "n h"],
    dead: Bool[Tensor, " h"],
    k: int,
    w_dec: Float[Tensor, "h d"],
) -> Float[Tensor, " n"]:
    """What the k best dead latents leave of the residual: ‖e − ê‖²/‖e‖², ê = Σ_j p_j·w_j over the k dead latents of the
    largest p (Gao et al., A.2). Without a ReLU, which would let nothing learn that is below 0 everywhere. The residual
    is taken as given. Zero where no latent is dead.
    """
    numbers = dead.nonzero()[:, 0]
    if not len(numbers):
        return residual.new_zeros(residual.shape[0])
    values, at = pre[:, numbers].topk(min(k, len(numbers)), dim=-1, sorted=False)
    residual = residual.detach()
    rebuilt = decode_sparse(values.to(w_dec.dtype), numbers[at], w_dec)
    whole = residual.square().sum(-1)
    tiny = torch.finfo(whole.dtype).tiny
    return torch.where(whole > tiny, (residual - rebuilt).square().sum(-1) / whole.clamp(min=tiny), 0.0)


def orthogonality(r: Float[Tensor, "n h"]) -> Float[Tensor, ""]:
    """1/(h(h−1))·Σ_{i≠j} G_ij², G = ẐᵀẐ with Ẑ = r, each column centred and of length 1 (paper B, A.2).

    A latent that is constant over the batch correlates with nothing and counts as 0. The Gram matrix is taken on the
    smaller side: Σ_ij G_ij² = ‖ẐᵀẐ‖² = ‖ẐẐᵀ‖².
    """
    n, h = r.shape
    if h < 2 or n < 2:
        return r.new_zeros(())
    z = r - r.mean(0)
    squared = z.square().sum(0)
    live = squared > torch.finfo(r.dtype).eps * r.detach().square().sum(0)
    z = torch.where(live, z / torch.where(live, squared, 1.0).sqrt(), 0.0)
    gram = z @ z.T if n < h else z.T @ z
    # The diagonal of ẐᵀẐ is 1 at every latent that varies.
    return (gram.square().sum() - live.sum()) / (h * (h - 1))


class _JumpReLU(torch.autograd.Function):
    """p·1[p > θ]; to θ the straight-through −(θ/ε)·K((p − θ)/ε), K the rectangle of width and area 1."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, torch.relu(pre), 0.0)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (u,) = outputs
        near = _rectangle(pre, threshold, ctx.bandwidth)
        to_threshold = -(threshold / ctx.bandwidth) * (near * u).sum(0)
        return torch.where((pre > threshold) & (pre > 0), u, 0.0), to_threshold, None


class _Step(torch.autograd.Function):
    """1[p > θ]; to θ the straight-through −(1/ε)·K((p − θ)/ε), to p nothing."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -(_rectangle(pre, threshold, ctx.bandwidth) * outputs[0]).sum(0) / ctx.bandwidth, None


def _rectangle(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (((pre - threshold) / bandwidth).abs() < 0.5).to(pre.dtype)


def jump_relu(pre: Float[Tensor, "n h"], threshold: Float[Tensor, " h"], bandwidth: float) -> Float[Tensor, "n h"]:
    """p·1[p > θ] for thresholds θ > 0, which learn through those p that lie within bandwidth/2 of them."""
    return _JumpReLU.apply(pre, threshold, bandwidth)


def l0(pre: Float[Tensor, "n h"], threshold: Float[Tensor, " h"], bandwidth: float) -> Float[Tensor, " n"]:
    """Number of latents above their thresholds, per state; its gradient reaches the thresholds alone."""
    return _Step.apply(pre, threshold, bandwidth).sum(-1)


def spread_out(values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], latents: int) -> Float[Tensor, "n h"]:
    """Sparse activations as all latents of every state; for terms that need them side by side."""
    return values.new_zeros((values.shape[0], latents)).scatter_add(1, indices, values)
