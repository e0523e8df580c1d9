"""Contraction: one backward to the activations, and at every tracked layer Σ_t δ_tᵀ S a_t (METHODS §2).

In: rows. Out: ⟨s, ∇⟩ of each row's summed loss, by block and by position. With a the layer's input [B, T, in] and δ the
gradient at its output [B, T, out], a row's ∇W is Σ_t δ_t a_tᵀ, so ⟨S, ∇W⟩ = Σ_t δ_tᵀ S a_t. One query: a Sᵀ, a product
as large as the layer's own. Many: the ∇W of a few rows at once, of this one layer, against all queries; they are gone
when the next rows' are made, and bounded (`_PRODUCTS`).
Of low rank: S = u v, (δ u)·(v a), two thin products. All queries share the forward and the backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curate.models.linear_tap import LinearTap
from curate.models.response_loss import summed_response_loss
from curate.models.tracked import TrackedLayer
from curate.scoring.directional.base import Backend, BatchSums, RowBatch, sum_dtype
from curate.scoring.directional.stacked import Stacked
from curate.scoring.directional.tangents import Direction

# Per-row products Σ_t δ_t a_tᵀ held at once: 64 MiB in float32, or one row's where that is larger.
_PRODUCTS = 16 * 2**20


class Contraction(Backend):
    name = "contraction"
    gives_blocks = True

    def _take(self, vectors: Stacked) -> None:
        self._tap = LinearTap(self.model, self.layers)
        self._dtype = sum_dtype(self.model.dtype)
        self.directions, units = vectors.directions(self.model)
        self._units = units.to(self.device, self._dtype)

    def _batch(self, batch: RowBatch) -> BatchSums:
        rows, queries = len(batch), self.n_queries
        scores = torch.zeros((rows, queries), dtype=self._dtype, device=self.device)
        blocks = scores.new_zeros((rows, queries, self.n_blocks)) if self.by_block else None
        tokens = scores.new_zeros((rows, batch.ids.shape[1], queries)) if self.per_token else None

        def on_layer(layer: TrackedLayer, a: Tensor, delta: Tensor) -> None:
            if tokens is None:
                part = contract(self.directions[layer.name], a, delta)
            else:
                each = contract_each(self.directions[layer.name], a, delta)
                tokens[:, : each.shape[1]] += each
                part = each.sum(1)
            scores.add_(part)
            if blocks is not None:
                blocks[..., layer.block] += part

        self._tap.backward(
            batch.inputs,
            lambda last: summed_response_loss(self.model, last, batch.ids, batch.starts, batch.ends),
            on_layer,
        )
        return BatchSums(
            scores * self._units,
            None if blocks is None else blocks * self._units[:, None],
            None if tokens is None else tokens * self._units,
        )

    def _flops(self, lengths: Sequence[int], loss_tokens: int) -> float:
        return self._flops_of_backward(lengths, loss_tokens) + contract_flops(
            self.directions, self.layers, lengths, self.per_token
        )


def contract_flops(
    directions: Mapping[str, Direction], layers: Sequence[TrackedLayer], lengths: Sequence[int], each: bool = False
) -> float:
    """FLOPs of `contract` (`each`: of `contract_each`) at `layers`, over rows of `lengths` tokens."""
    tokens, rows = sum(lengths), len(lengths)
    products = 0
    for layer in layers:
        block = directions[layer.name]
        if len(block) == 2:
            queries, rank, _ = block[1].shape
            products += queries * rank * (layer.out + layer.width) * tokens
        else:
            queries = block[0].shape[0]
            shared = queries > 1 and not each
            products += layer.size * (tokens + queries * rows if shared else queries * tokens)
    return 2.0 * products


def contract(
    block: Direction, a: Float[Tensor, "batch tokens in"], delta: Float[Tensor, "batch tokens out"]
) -> Float[Tensor, "batch q"]:
    """Σ_t δ_tᵀ S_q a_t for every row and query, summed in float32 at least."""
    if len(block) == 2 or block[0].shape[0] == 1:
        return contract_each(block, a, delta).sum(1)
    (s,) = block
    step = max(1, _PRODUCTS // (s.shape[1] * s.shape[2]))
    return torch.cat([_dot(delta[i : i + step].mT @ a[i : i + step], s) for i in range(0, a.shape[0], step)])


def _dot(products: Float[Tensor, "some out in"], s: Float[Tensor, "q out in"]) -> Float[Tensor, "some q"]:
    """⟨S_q, P⟩ of every product and query, without a copy of S in another precision."""
    wide = sum_dtype(s.dtype)
    if s.dtype == wide:
        return products.flatten(1) @ s.flatten(1).T
    # Row by row of the matrices in half precision, which the products are rounded to in any case; the rows in float32.
    return torch.bmm(products.transpose(0, 1), s.permute(1, 2, 0)).to(wide).sum(0)


def contract_each(
    block: Direction, a: Float[Tensor, "batch tokens in"], delta: Float[Tensor, "batch tokens out"]
) -> Float[Tensor, "batch tokens q"]:
    """δ_tᵀ S_q a_t at every position."""
    wide = sum_dtype(a.dtype)
    if len(block) == 1:
        heavy = delta.to(wide)
        return torch.stack([torch.linalg.vecdot((a @ s.T).to(wide), heavy) for s in block[0]], dim=-1)
    u, v = block
    queries, rank, width = v.shape
    left = delta @ u.permute(1, 0, 2).reshape(-1, queries * rank)
    inner = (a @ v.reshape(-1, width).T).to(wide) * left
    return inner.unflatten(-1, (queries, rank)).sum(-1)
