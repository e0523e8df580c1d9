"""Test vectors item by item: s = H⁻¹∇f for every test item by itself, in a model with or without an SAE; and the rows
that conjugate gradients take their curvature from.

Turns Settings into what the library takes. The curvature is that of the same model: with an SAE, factors are fitted and
products taken with its reconstruction in place of its layer's state. Keyed by all of it, and found again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from connectors import storage
from curate import __version__
from curate.corpus.recipe import Recipe
from curate.curvature.behaviour import Behaviour
from curate.curvature.conjugate_gradient import CGSpec
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.queries import Query
from curate.curvature.test_vector import TestVectorHeader
from curate.models.tracked import LayerChoice
from curate.runtime.conjugate_gradient import CGRows
from curate.runtime.differentiator import DifferentiatorSpec, differentiators
from curate.runtime.test_vectors import VectorSpec, make_test_vectors

if TYPE_CHECKING:
    from jobs.influence import Influence


@dataclass(frozen=True)
class ItemVector:
    """The test vector of `items`, one row for each, called by its id.

    name: of the file, and in what is told. layers: the tracked ones, in blocks ≥ the SAE's layer. sae, sae_digest:
    where the SAE lies, and what it is; None: the model as it is. kind: "identity" for ∇f itself, None for the
    configured curvature.
    """

    influence: Influence
    name: str
    items: Sequence[Query]
    behaviour: Behaviour
    layers: LayerChoice
    sae: str | None
    sae_digest: str | None
    kind: Literal["identity"] | None

    @property
    def curvature(self) -> CurvatureSpec:
        """As configured, of these layers."""
        spec = self.influence.spec if self.kind is None else replace(self.influence.spec, kind="identity")
        return replace(spec, layers=self.layers)

    @property
    def factor_recipe(self) -> Recipe | None:
        """None where nothing is fitted."""
        if self.curvature.kind == "identity":
            return None
        spec = {**asdict(self.curvature), "max_tokens": self.influence.reader.max_tokens}
        return Recipe("factors", {**self.influence.rows, "curvature": spec, **self._sae})

    @property
    def _sae(self) -> dict[str, Any]:
        return {} if self.sae is None else {"sae": self.sae_digest}

    def make(self) -> tuple[str, TestVectorHeader]:
        """(URL without suffix, header); fits and solves what is not there.

        Raises:
            CurvatureError: an item without a gradient, two items of one id, layers below the SAE; what fit and solve
                raise.
        """
        i = self.influence
        cg = cg_rows(i) if self.kind is None else None
        factors = self.factor_recipe
        curved = cg is not None or factors is not None
        fields = {
            "code": __version__,
            "model": i.facts,
            "layers": asdict(self.layers),
            "behaviour": [self.behaviour.name, asdict(self.behaviour.spec), self.behaviour.reduction],
            "direction": _mark(self.behaviour.direction),
            "items": [asdict(q) for q in self.items],
            "factors": None if factors is None else factors.digest,
            "cg": None if cg is None else cg_fields(i),
            "damping": asdict(i.damping) if curved else None,
            "rank": i.config.curvature.rank,
            **self._sae,
        }
        recipe = Recipe("item_vector", fields)
        url = storage.join(i.pipeline.store, "test_vectors", f"{self.name}-{recipe.digest}")
        kind = "cg" if cg is not None else self.curvature.kind
        budget, session = i.pipeline.session.gradient_token_budget, i.pipeline.session
        with differentiators(DifferentiatorSpec(i.model, self.layers, budget, self.sae), session) as crew:
            made = not storage.exists(f"{url}.json")
            place = i.fit(crew, factors, self.curvature) if made and factors is not None else None
            rank = i.config.curvature.rank
            spec = VectorSpec(
                self.name, url, recipe, i.identity, [self.behaviour], self.items, kind, place, i.damping, rank, True, cg
            )
            return url, make_test_vectors([spec], crew)[self.name]


def cg_rows(influence: Influence) -> CGRows | None:
    """The rows of conjugate gradients; None where curvature is of another kind."""
    if influence.cg is None:
        return None
    pipeline, bad = influence.pipeline, influence.config.source.max_bad_fraction
    return CGRows(influence.cg, influence.reader, pipeline.whole_manifest, influence.spec.reduction, bad)


def cg_fields(influence: Influence) -> dict[str, Any]:
    """The same in recipes: what changes a solution."""
    numbers = {k: v for k, v in asdict(influence.cg or CGSpec()).items() if k not in ("block", "save_every")}
    longest, reduction = influence.reader.max_tokens, influence.spec.reduction
    return {**influence.rows, **numbers, "max_tokens": longest, "reduction": reduction}


def _mark(direction: Tensor | None) -> str | None:
    """Names a concept's direction in a recipe."""
    if direction is None:
        return None
    return hashlib.blake2b(direction.float().numpy().tobytes(), digest_size=12).hexdigest()
