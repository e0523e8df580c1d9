"""Vector filter: how far the response's activations lie along the concept (paper A, eq. 15).

score(x, y) = a_l(x, y)·v/‖v‖, a_l the mean over response tokens of hidden_states[l] of the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from curate.concepts.concept import Concept
from curate.scoring.base import Batch, Columns, Needs, Scorer
from curate.scoring.directions import Directions


class VectorFilter(Scorer):
    """Layers: those given, or each concept's recommended one. One column for every concept and layer."""

    name = "vector_filter"

    def __init__(self, concepts: Sequence[Concept], layers: int | Sequence[int] | None = None) -> None:
        self.directions = Directions(self.name, concepts, layers)

    def needs(self) -> Needs:
        return Needs(layers=self.directions.layers)

    def columns(self) -> list[str]:
        return self.directions.columns()

    def prepare(self, device: torch.device) -> None:
        self.directions.to(device)

    def score(self, batch: Batch) -> Columns:
        return self.directions.project(batch.pooled)

    def fingerprint(self) -> dict[str, Any]:
        return self.directions.fingerprint()
