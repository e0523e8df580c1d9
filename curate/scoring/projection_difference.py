"""Projection difference: how much further along the concept than the model's own response (paper A, eq. 13-14).

score(x, y) = (a_l(x, y) - a_l(x, ŷ))·v/‖v‖, ŷ the base model's own response to x. What the prompt brings cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from curate.concepts.concept import Concept
from curate.scoring.base import Batch, Columns, Needs, Scorer
from curate.scoring.directions import Directions


class ProjectionDifference(Scorer):
    """Layers as in the vector filter. A row without a response of the model's own gets NaN."""

    name = "projection_difference"

    def __init__(self, concepts: Sequence[Concept], layers: int | Sequence[int] | None = None) -> None:
        self.directions = Directions(self.name, concepts, layers)

    def needs(self) -> Needs:
        return Needs(layers=self.directions.layers, generated=self.directions.layers)

    def columns(self) -> list[str]:
        return self.directions.columns()

    def prepare(self, device: torch.device) -> None:
        self.directions.to(device)

    def score(self, batch: Batch) -> Columns:
        # Subtract before projecting: two projections may be large and nearly equal.
        return self.directions.project({k: batch.pooled[k] - batch.generated[k] for k in self.directions.layers})

    def fingerprint(self) -> dict[str, Any]:
        return self.directions.fingerprint()
