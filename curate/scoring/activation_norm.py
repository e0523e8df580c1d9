"""Activation norm baseline: ‖a_l(x, y)‖, the length of the response-mean activation. Higher = larger activations.

It tells how much of a vector filter's ranking is mere size of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from curate.concepts.concept import Concept
from curate.errors import ConfigError
from curate.scoring.base import Batch, Columns, Needs, Scorer, as_column, column
from curate.scoring.directions import as_layers


class ActivationNorm(Scorer):
    """Layers: those given, or the layers that the concepts of the run recommend."""

    name = "activation_norm"

    def __init__(self, concepts: Sequence[Concept] = (), layers: int | Sequence[int] | None = None) -> None:
        recommended = tuple(dict.fromkeys(c.layer for c in concepts if c.layer is not None))
        self.layers = as_layers(layers, self.name) or recommended
        if not self.layers:
            raise ConfigError(f"{self.name} has no layer: set scorer.{self.name}.layers, for example [15]")

    def needs(self) -> Needs:
        return Needs(layers=frozenset(self.layers))

    def columns(self) -> list[str]:
        return [column(self.name, layer=layer) for layer in self.layers]

    def score(self, batch: Batch) -> Columns:
        return {
            column(self.name, layer=layer): as_column(torch.linalg.vector_norm(batch.pooled[layer].float(), dim=1))
            for layer in self.layers
        }

    def fingerprint(self) -> dict[str, Any]:
        return {"method": self.name, "layers": list(self.layers)}
