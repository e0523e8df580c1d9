"""Blocks: one tracked layer's part of a test vector, dense or as two thin matrices.

In: tensors [Q, out, in], one matrix a behaviour. Out: the same, cut to a rank or joined. Knows no layer and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dense:
    """One layer's block of s, as it is."""

    values: Float[Tensor, "q out in"]

    @property
    def shape(self) -> tuple[int, int, int]:
        q, out, width = self.values.shape
        return q, out, width

    def dense(self) -> Float[Tensor, "q out in"]:
        return self.values


@dataclass(frozen=True, eq=False)
class LowRank:
    """One layer's block of s as u·v, two thin matrices a behaviour."""

    u: Float[Tensor, "q out r"]
    v: Float[Tensor, "q r in"]

    @property
    def shape(self) -> tuple[int, int, int]:
        q, out, _ = self.u.shape
        return q, out, int(self.v.shape[2])

    def dense(self) -> Float[Tensor, "q out in"]:
        return self.u @ self.v


Block = Dense | LowRank


def squared(block: Block) -> Float[Tensor, " q"]:
    """‖S‖² of every behaviour, float64, on the CPU."""
    if isinstance(block, Dense):
        return torch.linalg.vector_norm(block.values, dim=(1, 2), dtype=torch.float64).square().cpu()
    u, v = block.u.double(), block.v.double()
    return ((u.mT @ u) * (v @ v.mT)).sum((1, 2)).cpu()  # ‖uv‖² = ⟨uᵀu, vvᵀ⟩


def cut(block: Block, rank: int) -> LowRank:
    """The best approximation of rank `rank` of every behaviour's matrix.

    Large matrices are cut by a randomised range finder with power iterations, seeded, so that the result is a function
    of the input.
    """
    parts = [_cut(matrix, rank) for matrix in block.dense()]
    return LowRank(torch.stack([u for u, _ in parts]), torch.stack([v for _, v in parts]))


def join(
    parts: Sequence[tuple[int, Block | None]],
    out: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    scale: Float[Tensor, " q"] | None = None,
) -> Block:
    """The blocks of one layer, one under the other, each written to its place on `device` straight away, in `dtype`.

    A part (q, None) is q rows of zeros. Of low rank if all are. A single block that is on the device and of the dtype
    stays in the memory that it shares with others. With `scale`, each behaviour's matrix is multiplied by its entry.
    """
    found = [block for _, block in parts if block is not None]
    if len(parts) == len(found) == 1 and scale is None:
        (one,) = found
        if isinstance(one, Dense):
            return Dense(one.values.to(device, dtype))
        return LowRank(one.u.to(device, dtype), one.v.to(device, dtype))
    total = sum(q for q, _ in parts)
    ranks = [block.u.shape[2] for block in found if isinstance(block, LowRank)]
    thin, inner = len(ranks) == len(found), max(ranks, default=0)
    left = torch.zeros((total, out, inner if thin else width), device=device, dtype=dtype)
    right = torch.zeros((total, inner, width) if thin else (0,), device=device, dtype=dtype)
    end = 0
    for q, block in parts:
        at, end = slice(end, end + q), end + q
        if block is None:
            continue
        first = block.u if thin and isinstance(block, LowRank) else block.dense()
        if scale is not None:
            first = first * scale[at, None, None].to(first)
        left[at, :, : first.shape[2]] = first
        if thin and isinstance(block, LowRank):
            right[at, : block.v.shape[1]] = block.v
    return LowRank(left, right) if thin else Dense(left)


def _cut(matrix: Float[Tensor, "out in"], rank: int) -> tuple[Tensor, Tensor]:
    """(u [out, r], v [r, in]) with u·v the best approximation; the singular values are shared between the two."""
    r = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(4 * r, 256):
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        u, s, vt = u[:, :r], s[:r], vt[:r]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=r + 16, niter=4)
        u, s, vt = u[:, :r], s[:r], v[:, :r].mT
    root = s.sqrt()
    return (u * root).float().contiguous(), (root[:, None] * vt).float().contiguous()
