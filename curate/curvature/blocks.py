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


def cut(block: Block, rank: int) -> LowRank:
    """The best approximation of rank `rank` of every behaviour's matrix.

    Large matrices are cut by a randomised range finder with power iterations, seeded, so that the result is a function
    of the input.
    """
    parts = [_cut(matrix, rank) for matrix in block.dense()]
    return LowRank(torch.stack([u for u, _ in parts]), torch.stack([v for _, v in parts]))


def join(parts: Sequence[tuple[int, Block | None]], out: int, width: int) -> Block:
    """The blocks of one layer, one under the other; a part (q, None) is q rows of zeros. Of low rank if all are.

    A single block is returned as it is, in the memory that it shares with others.
    """
    found = [block for _, block in parts if block is not None]
    if len(parts) == len(found) == 1:
        return found[0]
    like = found[0].values if isinstance(found[0], Dense) else found[0].u
    thin = [block for block in found if isinstance(block, LowRank)]
    if len(thin) < len(found):
        return Dense(torch.cat([like.new_zeros((q, out, width)) if b is None else b.dense() for q, b in parts]))
    rank = max(block.u.shape[2] for block in thin)
    total = sum(q for q, _ in parts)
    u, v, at = like.new_zeros((total, out, rank)), like.new_zeros((total, rank, width)), 0
    for q, block in parts:
        if isinstance(block, LowRank):
            own = block.u.shape[2]
            u[at : at + q, :, :own], v[at : at + q, :own] = block.u, block.v
        at += q
    return LowRank(u, v)


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
