"""Difference: (∇_x̃ L(θ₂ + εs) − ∇_x̃ L(θ₂ − εs)) / 2ε, two ordinary backwards to the states a query (METHODS §5).

Any attention kernel, no second derivative, the memory of one backward. But rounding is divided by ε, so half precision
gives noise and is refused. The weights at θ₂ ± εs are new ones, given to the forward; the model's own stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from curate.errors import ConfigError
from curate.models.response_loss import summed_states_loss
from curate.models.tracked import weight_of
from curate.scoring.directional.difference import steps
from curate.scoring.latent.base import LatentBackend, LatentBatch, Weights


class Difference(LatentBackend):
    """
    Raises:
        ConfigError: the model is in half precision. Others: see LatentBackend.
    """

    name = "difference"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.model.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"the backend 'difference' needs float32 weights; the model is in {self.model.dtype}, whose rounding "
                f"is larger than the difference. Set model.dtype=float32, or choose 'reverse_over_forward'."
            )
        self.steps = steps(self._stacked, {name: weight_of(module) for name, module in self._modules.items()})

    def _slopes(self, batch: LatentBatch, queries: Sequence[int]) -> Float[Tensor, "q batch tokens d"]:
        found = []
        for q in queries:
            step, s = self.steps[q], self._direction([q])
            high, low = (self._backward(batch, self._moved(s, sign * step)) for sign in (1, -1))
            found.append((high - low) / (2 * step))
        return torch.stack(found)

    def _flops_above(self, once: float, lengths: Sequence[int], queries: int) -> float:
        return 2 * queries * once

    def _moved(self, s: Weights, step: float) -> Weights:
        return {name: torch.add(weight, s[name][0], alpha=step) for name, weight in self._weights.items()}

    def _backward(self, batch: LatentBatch, weights: Weights) -> Float[Tensor, "batch tokens d"]:
        with torch.enable_grad():
            x = batch.x.detach().requires_grad_(True)
            h = functional_call(self._down, weights, (x, batch.where), tie_weights=False)
            (gradient,) = torch.autograd.grad(summed_states_loss(self.model, h, batch.targets), x)
        return gradient
