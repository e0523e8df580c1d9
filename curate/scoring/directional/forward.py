"""Forward: d/dε of the loss carried beside the values, from the lowest tracked block upwards (METHODS §2).

In: rows. Out: ⟨s, ∇⟩ of each row's summed loss, by token. No backward and no stored activations. Llama, Qwen2, Qwen3
and Mistral blocks have their tangents written by hand; other models, and adapters that are not merged, take PyTorch's
forward-mode differentiation (generic_forward.py). The last step is a dot product: with h the last hidden state,
d/dε ℓ = ∂ℓ/∂h · ḣ, and ∂ℓ/∂h serves all queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curate.curvature.test_vector import Dense
from curate.models.response_loss import predicting_mask, summed_response_loss
from curate.scoring.directional.base import Backend, BatchSums, RowBatch, sum_dtype
from curate.scoring.directional.dual_blocks import DualBlocks, supported
from curate.scoring.directional.generic_forward import GenericTangents
from curate.scoring.directional.tangents import Direction

# Tangents carried at once; more of them are carried in another pass.
_QUERIES = 8


class Forward(Backend):
    name = "forward"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Unit vectors, so that tangents neither overflow nor vanish in half precision.
        self._norms = self.vector.norm()
        scale = torch.where(self._norms > 0, 1.0 / self._norms, 0.0)
        dtype, wide = self.model.dtype, sum_dtype(self.model.dtype)
        directions: dict[str, Direction] = {}
        for name, block in self.vector.blocks.items():
            first = block.values if isinstance(block, Dense) else block.u
            unit = (first.to(wide) * scale.to(first.device, wide)[:, None, None]).to(self.device, dtype)
            directions[name] = (unit,) if isinstance(block, Dense) else (unit, block.v.to(self.device, dtype))
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
        norms = self._norms.to(tokens.device, tokens.dtype)
        tokens[:, 1:][predicting] = torch.cat(found, dim=1) * norms
        return BatchSums(tokens.sum(1), None, tokens if self.per_token else None)

    def _slope(self, batch: RowBatch, predicting: Tensor, value: Tensor) -> Float[Tensor, "positions d"]:
        """∂ℓ/∂h at the positions that predict."""
        last = torch.zeros((*predicting.shape, value.shape[-1]), dtype=value.dtype, device=value.device)
        last[predicting] = value
        with torch.enable_grad():
            last.requires_grad_(True)
            loss = summed_response_loss(self.model, last, batch.ids, batch.starts, batch.ends)
            (slope,) = torch.autograd.grad(loss, last)
        return slope[predicting]
