"""Directions: the unit concept vectors v/‖v‖ that the vector methods project on, by layer.

In: concepts and layers. Out: one score column for every concept and layer. All concepts of a layer are one matrix, so
that more of them cost a dot product each, not a pass. Knows no model; a width that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curate.concepts.concept import Concept, digest, direction
from curate.errors import ConceptError, ConfigError
from curate.scoring.base import Columns, as_column, column


def as_layers(layers: int | Sequence[int] | None, method: str) -> tuple[int, ...] | None:
    """`layers` of a setting as a tuple without doubles; None stays None.

    Raises:
        ConfigError: an entry is not a whole number of at least 0, or the list is empty.
    """
    if layers is None:
        return None
    given = (layers,) if isinstance(layers, int) else tuple(layers) if isinstance(layers, Sequence) else (layers,)
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ConfigError(f"{method}.layers holds {layer!r}; a layer is a whole number, 0 (the embeddings) or more")
    if not given:
        raise ConfigError(f"{method}.layers is empty; leave it out to use each concept's recommended layer")
    return tuple(dict.fromkeys(given))


class Directions:
    """Unit vectors of `concepts` at `layers` (None: each concept's recommended one), and the columns they make.

    Raises:
        ConfigError: no concept, two concepts of one name, or no layer is known for a concept.
        ConceptError: a concept has no usable vector at a layer.
    """

    def __init__(self, method: str, concepts: Sequence[Concept], layers: int | Sequence[int] | None = None) -> None:
        if not concepts:
            raise ConfigError(f"the scorer {method!r} needs a concept and none is given; set concept=…")
        names = [c.name for c in concepts]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(f"two concepts are named {twice[0]!r}, so their columns would collide; rename one")
        wanted = as_layers(layers, method)
        self.method = method
        self.targets: list[tuple[Concept, int]] = []
        for concept in concepts:
            recommended = () if concept.layer is None else (concept.layer,)
            if not (wanted or recommended):
                raise ConfigError(
                    f"the concept {concept.name!r} recommends no layer; choose one, for example "
                    f"scorer.{method}.layers=[15]"
                )
            self.targets += [(concept, layer) for layer in wanted or recommended]
        self._columns: dict[int, list[str]] = {}
        rows: dict[int, list[Tensor]] = {}
        for concept, layer in self.targets:
            self._columns.setdefault(layer, []).append(column(method, concept.name, layer))
            rows.setdefault(layer, []).append(torch.as_tensor(direction(concept, layer), dtype=torch.float32))
        for layer, vectors in rows.items():
            if len({v.numel() for v in vectors}) > 1:
                raise ConceptError(
                    f"the concepts {names} have different widths at layer {layer}: {[v.numel() for v in vectors]}; "
                    f"they belong to different models and cannot be scored together"
                )
        self.matrices: dict[int, Float[Tensor, "concepts d"]] = {k: torch.stack(v) for k, v in rows.items()}

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(self.matrices)

    def columns(self) -> list[str]:
        """In the order of the concepts, then of the layers."""
        return [column(self.method, concept.name, layer) for concept, layer in self.targets]

    def to(self, device: torch.device) -> None:
        self.matrices = {layer: m.to(device) for layer, m in self.matrices.items()}

    def project(self, vectors: Mapping[int, Float[Tensor, "n d"]]) -> Columns:
        """x·v/‖v‖ in float32, for every concept and layer; `vectors[l]` are the rows' vectors of layer l.

        Raises:
            ConceptError: the concept's width is not the model's.
        """
        found: Columns = {}
        for layer, matrix in self.matrices.items():
            rows = vectors[layer].float()
            if rows.shape[1] != matrix.shape[1]:
                raise ConceptError(
                    f"{self._columns[layer][0]!r} has a vector of width {matrix.shape[1]}, but the model's width is "
                    f"{rows.shape[1]}; the concept was made with another model"
                )
            scores = rows @ matrix.T
            found.update((name, as_column(scores[:, i])) for i, name in enumerate(self._columns[layer]))
        return {name: found[name] for name in self.columns()}

    def fingerprint(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "targets": [{"concept": c.name, "digest": digest(c), "layer": layer} for c, layer in self.targets],
        }
