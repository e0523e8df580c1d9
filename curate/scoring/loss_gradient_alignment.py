"""Loss-gradient alignment: would moving the activations along the concept lower the example's loss (paper A, eq. 12)?

score(z) = -(∂L(z)/∂a_l)·v/‖v‖, L the mean cross-entropy of the response tokens and ∂L/∂a_l = Σ_t ∂L/∂h_t over them:
the derivative for a shift of every response token's residual stream, which shifts their mean a_l by as much.
Positive: gradient descent on z pushes the residual stream towards the concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from curate.concepts.concept import Concept
from curate.scoring.base import Batch, Columns, Needs, Scorer
from curate.scoring.directions import Directions


class LossGradientAlignment(Scorer):
    """Layers as in the vector filter. Costs the whole forward, and a backward down to the lowest layer."""

    name = "loss_gradient_alignment"

    def __init__(self, concepts: Sequence[Concept], layers: int | Sequence[int] | None = None) -> None:
        self.directions = Directions(self.name, concepts, layers)

    def needs(self) -> Needs:
        return Needs(gradients=self.directions.layers)

    def columns(self) -> list[str]:
        return self.directions.columns()

    def prepare(self, device: torch.device) -> None:
        self.directions.to(device)

    def score(self, batch: Batch) -> Columns:
        return self.directions.project({layer: -batch.gradients[layer] for layer in self.directions.layers})

    def fingerprint(self) -> dict[str, Any]:
        return self.directions.fingerprint()
