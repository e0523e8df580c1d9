"""FLOPs of a training, from the model's shape: forward, backward to the activations, gradients of what is trained.

In: a model as it is trained, and counts of tokens without padding. Out: FLOPs, one multiply-add = 2. What gradient
checkpointing computes again is left out, as is usual for the share of a device's peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from curate.models.flops import ForwardCost, model_cost, weight_gradient_products
from curate.training.adapt import causal_lm

Count = TypeVar("Count", float, np.ndarray)


@dataclass(frozen=True)
class TrainingCost:
    """Beside `forward` the multiply-adds to the weights' gradients: `trained` for each token that goes through the
    blocks, `head` for each token of the loss."""

    forward: ForwardCost
    trained: float
    head: float

    def flops(self, tokens: Count, pairs: Count, losses: Count) -> Count:
        """FLOPs of rows with Σ n = `tokens`, Σ n² = `pairs` and so many `losses`, as numbers or arrays of one shape.

        In the backward each product comes once more, for the gradient of its input; attention's two come twice each,
        for both their inputs are computed.
        """
        forward = self.forward
        products = forward.blocks * forward.block * tokens + forward.head * losses
        attention = forward.blocks * forward.attention * pairs
        return 2.0 * (2 * products + 3 * attention + self.trained * tokens + self.head * losses)


def training_cost(model: Any) -> TrainingCost:
    """Of a model as load_for_training gives it."""
    inner = causal_lm(model)
    return TrainingCost(model_cost(inner), *weight_gradient_products(inner))
