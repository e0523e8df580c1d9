"""Cosine: the directional derivative over the norms of both gradients, exact, in the one backward that gives it.

In: rows. Out: cos(−∇L_i, s_q), the part of a score that does not grow with the size of either gradient: 1 where a step
on the row moves the weights along s. With s = ∇f (H = I) it is the cosine between the row's gradient and the item's.

A row's norm needs no gradient of its own: ∇_W L_i = Σ_t δ_t a_tᵀ, so with the Gram matrices of the row's tokens

    ‖∇_W L_i‖² = Σ_tu (δ_t·δ_u)(a_t·a_u)            T²(out + in) products, the one of a shared by q, k and v

or, for rows longer than the layer is wide, where that would be more, by the matrix Σ_t δ_t a_tᵀ itself, of one layer
and a few rows at once: T · out · in products. Both are exact; each layer and batch takes the cheaper one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curate.models.linear_tap import LinearTap
from curate.models.response_loss import summed_response_loss
from curate.models.tracked import TrackedLayer
from curate.scoring.directional.base import Backend, BatchSums, RowBatch, sum_dtype
from curate.scoring.directional.contraction import contract, contract_flops
from curate.scoring.directional.stacked import Stacked

# Numbers of products held at once: 64 MiB in float32.
_PRODUCTS = 16 * 2**20


class SquaredNorms:
    """‖∇_W ·‖² of every row of a batch, layer by layer in the order of a backward."""

    def __init__(self) -> None:
        self._gram: tuple[str, Tensor] | None = None

    def __call__(
        self, layer: TrackedLayer, a: Float[Tensor, "batch tokens in"], delta: Float[Tensor, "batch tokens out"]
    ) -> Float[Tensor, " batch"]:
        """In float32, or float64 in a float64 model. Padding counts nothing, as its δ is zero."""
        wide = sum_dtype(delta.dtype)
        a, delta = a.to(wide), delta.to(wide)
        if not _gram_is_cheaper(a.shape[1], layer):
            return _by_matrix(a, delta)
        if self._gram is None or self._gram[0] != layer.reads:
            self._gram = layer.reads, a @ a.mT
        return torch.einsum("btu,btu->b", delta @ delta.mT, self._gram[1]).clamp(min=0)

    def clear(self) -> None:
        """Forget the batch."""
        self._gram = None

    @staticmethod
    def flops(layers: Sequence[TrackedLayer], lengths: Sequence[int]) -> float:
        """Of the norms over `layers` of rows of `lengths` tokens."""
        products = 0
        for n in lengths:
            inputs = set()
            for layer in layers:
                if _gram_is_cheaper(n, layer):
                    products += n * n * (layer.out + (0 if layer.reads in inputs else layer.width))
                    inputs.add(layer.reads)
                else:
                    products += n * layer.size
        return 2.0 * products


def _gram_is_cheaper(tokens: int, layer: TrackedLayer) -> bool:
    return tokens * (layer.out + layer.width) <= layer.size


def _by_matrix(a: Tensor, delta: Tensor) -> Float[Tensor, " batch"]:
    step = max(1, _PRODUCTS // (a.shape[-1] * delta.shape[-1]))
    parts = [
        torch.linalg.vector_norm(delta[i : i + step].mT @ a[i : i + step], dim=(1, 2)).square()
        for i in range(0, a.shape[0], step)
    ]
    return torch.cat(parts)


class Cosine(Backend):
    """Gives cosines where other backends give derivatives. The norms are over all layers of the test vectors."""

    name = "cosine"

    def _take(self, vectors: Stacked) -> None:
        self.reduction = "sum"  # of no effect on a cosine; the sums of a batch are then not divided again
        self._tap = LinearTap(self.model, vectors.every)
        self._dtype = sum_dtype(self.model.dtype)
        self.directions, units = vectors.directions(self.model)
        sizes = vectors.norm() * units
        self._units = torch.where(sizes > 0, 1.0 / sizes, torch.nan).to(self.device, self._dtype)
        self._norms = SquaredNorms()

    def _batch(self, batch: RowBatch) -> BatchSums:
        scores = torch.zeros((len(batch), self.n_queries), dtype=self._dtype, device=self.device)
        squares = scores.new_zeros(len(batch))

        def on_layer(layer: TrackedLayer, a: Tensor, delta: Tensor) -> None:
            if layer.name in self.directions:
                scores.add_(contract(self.directions[layer.name], a, delta))
            squares.add_(self._norms(layer, a, delta))

        self._tap.backward(
            batch.inputs,
            lambda last: summed_response_loss(self.model, last, batch.ids, batch.starts, batch.ends),
            on_layer,
        )
        self._norms.clear()
        # A row without a gradient has no direction: 0/0, which is told as NaN.
        return BatchSums(scores * self._units / squares.sqrt()[:, None])

    def _flops(self, lengths: Sequence[int], loss_tokens: int) -> float:
        directed = [layer for layer in self._tap.layers if layer.name in self.directions]
        own = contract_flops(self.directions, directed, lengths) + self._norms.flops(self._tap.layers, lengths)
        return self._flops_of_backward(lengths, loss_tokens) + own
