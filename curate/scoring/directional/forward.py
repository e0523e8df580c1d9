"""Forward: d/dε of the loss carried beside the values, from the lowest tracked block upwards (METHODS §2).

In: rows. Out: ⟨s, ∇⟩ of each row's summed loss, by token. No backward and no stored activations. Llama, Qwen2, Qwen3
and Mistral blocks have their tangents written by hand; other models, and adapters that are not merged, take PyTorch's
forward-mode differentiation (generic_forward.py). The last step is a dot product: with h the last hidden state,
d/dε ℓ = ∂ℓ/∂h · ḣ, and ∂ℓ/∂h serves all queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curate.models.response_loss import predicting_mask, summed_response_loss
from curate.scoring.directional.base import Backend, BatchSums, RowBatch, sum_dtype
from curate.scoring.directional.dual_blocks import DualBlocks, supported
from curate.scoring.directional.generic_forward import GenericTangents
from curate.scoring.directional.stacked import Stacked

# Tangents carried at once; more of them are carried in another pass.
_QUERIES = 8


class Forward(Backend):
    name = "forward"

    def _take(self, vectors: Stacked) -> None:
        directions, self._units = vectors.directions(self.model)
        make: Callable[..., Any] = DualBlocks if supported(self.model) else GenericTangents
        self._groups = [
            make(self.model, {name: tuple(part[i : i + _QUERIES] for part in s) for name, s in directions.items()})
            for i in range(0, self.n_queries, _QUERIES)
        ]

    def _batch(self, batch: RowBatch) -> BatchSums:
        predicting = predicting_mask(batch.starts, batch.ends, batch.inputs.shape[1], self.device)
        slope: Tensor | None = None
        found = []
        for group in self._groups:
            value, moved = group(batch.inputs, predicting)
            if slope is None:
                slope = self._slope(batch, predicting, value).to(sum_dtype(value.dtype))
            found.append((moved.to(slope.dtype) * slope[:, None]).sum(-1))
        tokens = torch.zeros((*batch.ids.shape, self.n_queries), dtype=sum_dtype(self.model.dtype), device=self.device)
        tokens[:, 1:][predicting] = torch.cat(found, dim=1) * self._units.to(tokens.device, tokens.dtype)
        return BatchSums(tokens.sum(1), None, tokens if self.per_token else None)

    def _flops(self, lengths: Sequence[int], loss_tokens: int) -> float:
        head = 2.0 * self._cost.head * loss_tokens
        return 2 * head + sum(group.flops(self._cost, lengths, loss_tokens) for group in self._groups)

    def _slope(self, batch: RowBatch, predicting: Tensor, value: Tensor) -> Float[Tensor, "positions d"]:
        """∂ℓ/∂h at the positions that predict."""
        last = torch.zeros((*predicting.shape, value.shape[-1]), dtype=value.dtype, device=value.device)
        last[predicting] = value
        with torch.enable_grad():
            last.requires_grad_(True)
            loss = summed_response_loss(self.model, last, batch.ids, batch.starts, batch.ends)
            (slope,) = torch.autograd.grad(loss, last)
        return slope[predicting]
