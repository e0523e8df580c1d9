"""Sparse decoding: Σ_j v_j W[i_j] and what its derivatives are made of, without a dense [states, latents] matrix.

In: values [n, k], indices [n, k], a matrix W [h, d]. Out: [n, d]. Knows no SAE.

T(v, W, u) = Σ_nj v_nj (W[i_nj]·u_n) is linear in each of its three arguments, so its three gradients give every further
derivative: `decode_sparse` is the one by u, `read_rows` the one by v (the products u·W[i_j]), `outer_sum` the one by W.
Plain indexing would hold W's rows for every state and slot, [n, k, d]. The kernels of embedding bags (one sum, and the
two halves of its backward) hold none of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# A sum into few latents is faster as a product with a dense [states, latents] matrix, this many numbers of it at once.
_CHUNK = 2**22
_FEW = 32  # times k


def decode_sparse(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], w: Float[Tensor, "h d"]
) -> Float[Tensor, "n d"]:
    """Σ_j values[n, j]·W[indices[n, j]]."""
    return _Decode.apply(values, indices, w)


def read_rows(u: Float[Tensor, "n d"], indices: Int[Tensor, "n k"], w: Float[Tensor, "h d"]) -> Float[Tensor, "n k"]:
    """u[n]·W[indices[n, j]]."""
    return _ReadRows.apply(u, indices, w)


def outer_sum(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], u: Float[Tensor, "n d"], h: int
) -> Float[Tensor, "h d"]:
    """Row i: Σ values[n, j]·u[n] over all n, j with indices[n, j] = i."""
    return _OuterSum.apply(values, indices, u, h)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        return _bag(values, indices, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, w = ctx.saved_tensors
        (u,) = outputs
        to_values = read_rows(u, indices, w) if ctx.needs_input_grad[0] else None
        to_w = outer_sum(values, indices, u, w.shape[0]) if ctx.needs_input_grad[2] else None
        return to_values, None, to_w

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values, indices, w = ctx.saved_tensors
        dv, _, dw = tangents
        return _total(
            None if dv is None else decode_sparse(dv, indices, w),
            None if dw is None else decode_sparse(values, indices, dw),
        )


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(u: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        if not indices.numel():
            return w.new_zeros(indices.shape)
        with torch.enable_grad():
            values = torch.zeros(indices.shape, dtype=w.dtype, device=w.device, requires_grad=True)
            return torch.autograd.grad(_bag(values, indices, w.detach()), values, u.detach().to(w.dtype))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        u, indices, w = ctx.saved_tensors
        (v,) = outputs
        to_u = decode_sparse(v, indices, w) if ctx.needs_input_grad[0] else None
        to_w = outer_sum(v, indices, u, w.shape[0]) if ctx.needs_input_grad[2] else None
        return to_u, None, to_w

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u, indices, w = ctx.saved_tensors
        du, _, dw = tangents
        return _total(
            None if du is None else read_rows(du, indices, w),
            None if dw is None else read_rows(u, indices, dw),
        )


class _OuterSum(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, indices: Tensor, u: Tensor, h: int) -> Tensor:
        n, k = indices.shape
        values, u = values.detach().to(u.dtype), u.detach()
        out = u.new_zeros((h, u.shape[1]))
        if n and h > _FEW * k:
            with torch.enable_grad():
                w = out.requires_grad_(True)
                return torch.autograd.grad(_bag(values, indices, w), w, u)[0]
        rows = max(1, _CHUNK // h)
        for i in range(0, n, rows):
            part = slice(i, i + rows)
            dense = u.new_zeros((len(u[part]), h)).scatter_add_(1, indices[part], values[part])
            out.addmm_(dense.T, u[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        _keep(ctx, inputs[:3])
        ctx.h = inputs[3]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        values, indices, u = ctx.saved_tensors
        (w,) = outputs
        to_values = read_rows(u, indices, w) if ctx.needs_input_grad[0] else None
        to_u = decode_sparse(values, indices, w) if ctx.needs_input_grad[2] else None
        return to_values, None, to_u, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values, indices, u = ctx.saved_tensors
        dv, _, du, _ = tangents
        return _total(
            None if dv is None else outer_sum(dv, indices, u, ctx.h),
            None if du is None else outer_sum(values, indices, du, ctx.h),
        )


def _keep(ctx: Any, inputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _total(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None or other is None:
        found = other if one is None else one
        assert found is not None  # a jvp without a tangent is not asked for
        return found
    return one + other


def _bag(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    if not indices.numel():
        return w.new_zeros((indices.shape[0], w.shape[1]))
    return F.embedding_bag(indices, w, per_sample_weights=values, mode="sum")
