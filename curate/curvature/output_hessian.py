"""The loss as a function of the last hidden states: its value, gradient and curvature, a chunk of positions at a time.

In: last hidden states (after the final norm) of the positions that predict a response token, with their targets and
weights. Out: scalars, gradients and products [positions, d]. Never [positions, vocabulary] of more than a chunk. Knows
no layer below.

With z the logits of a position, p = softmax(z) and J = ∂z/∂h, cross-entropy has the Hessian diag(p) − ppᵀ in z,
whatever the target: Jᵀ(diag(p) − ppᵀ)J is the Gauss–Newton matrix in h. The full Hessian differs from it by the
curvature of z(h), which is zero but for heads that cap their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp, vjp, vmap
from transformers import PreTrainedModel

from curate.models.tap import head_logits

# Logits at once: 64 MiB in float32.
_LOGITS = 16 * 2**20


def gauss_newton_output(
    model: PreTrainedModel,
    states: Float[Tensor, "n d"],
    moved: Float[Tensor, "q n d"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, "q n d"]:
    """w_t Jᵀ(diag(p) − ppᵀ)J ḣ_t of every position t and direction ḣ, in float32 or better."""
    wide = torch.promote_types(states.dtype, torch.float32)
    out = torch.empty(moved.shape, dtype=wide, device=moved.device)

    def head(h: Tensor) -> Tensor:
        return head_logits(model, h).to(wide)

    with torch.no_grad():
        for i in _chunks(model, states.shape[0], moved.shape[0] + 1):
            h, w = states[i], weights[i].to(wide)
            z, pull = vjp(head, h)[:2]
            p = torch.softmax(z, -1)
            dz = vmap(lambda u, h=h: jvp(head, (h,), (u,))[1])(moved[:, i].to(h.dtype))
            dz = dz.mul_(p)
            dz -= p * dz.sum(-1, keepdim=True)
            (back,) = vmap(pull)(dz.mul_(w[:, None]))
            out[:, i] = back.to(wide)
    return out


def weighted_loss(
    model: PreTrainedModel,
    states: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Σ_t w_t · −log p(target_t | h_t), which may be differentiated twice by the states."""
    return _Loss.apply(states, targets, weights, model)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, weights: Tensor, model: PreTrainedModel) -> Tensor:
        ctx.save_for_backward(states)
        ctx.rest = targets, weights, model
        total = torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        for i in _chunks(model, states.shape[0]):
            total += _chunk_loss(model, states[i], targets[i], weights[i])
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        gradient = _Gradient.apply(states, *ctx.rest)
        return gradient * outputs[0].to(gradient.dtype), None, None, None


class _Gradient(torch.autograd.Function):
    """∂/∂h of the loss, made chunk by chunk; its own derivative is the Hessian's product, made likewise."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, weights: Tensor, model: PreTrainedModel) -> Tensor:
        ctx.save_for_backward(states)
        ctx.rest = targets, weights, model
        return _by_chunk(model, states, lambda h, i: _slope(model, h, targets[i], weights[i], False))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        targets, weights, model = ctx.rest

        def product(h: Tensor, i: slice) -> Tensor:
            slope = _slope(model, h, targets[i], weights[i], True)
            return torch.autograd.grad(slope, h, outputs[0][i])[0]

        return _by_chunk(model, states.detach(), product), None, None, None


def _by_chunk(model: PreTrainedModel, states: Tensor, make: Callable[[Tensor, slice], Tensor]) -> Tensor:
    out = torch.empty_like(states)
    for i in _chunks(model, states.shape[0], 2):
        with torch.enable_grad():
            out[i] = make(states[i].detach().requires_grad_(True), i).detach()
    return out


def _slope(model: PreTrainedModel, h: Tensor, targets: Tensor, weights: Tensor, again: bool) -> Tensor:
    (slope,) = torch.autograd.grad(_chunk_loss(model, h, targets, weights), h, create_graph=again)
    return slope


def _chunk_loss(model: PreTrainedModel, h: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    losses = F.cross_entropy(head_logits(model, h).to(wide), targets, reduction="none")
    return losses @ weights.to(wide)


def _chunks(model: PreTrainedModel, n: int, copies: int = 1) -> list[slice]:
    rows = max(1, _LOGITS // (int(model.config.get_text_config().vocab_size) * copies))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
