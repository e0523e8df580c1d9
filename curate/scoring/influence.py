"""Influence scores: influence function (paper A, eq. 1), concept influence (eq. 2), gradient product (eq. 7-9).

score(z) = -⟨s, ∇L(z)⟩ with s = H⁻¹∇f: up to first order, what training on z adds to the behaviour f. f is minus the
loss of the queries, the projection on a concept, or what the gradient product compares with; H = I for the gradient
product. f and H are in the test vector, which was made before; what is left is one directional derivative of the row's
loss, and that comes from directional/. Several queries are several columns of one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curate.curvature.test_vector import TestVector, TestVectorHeader
from curate.errors import ConfigError, near
from curate.scoring.base import Batch, Columns, Derivative, Needs, Scorer, as_column
from curate.scoring.directional.make import BACKENDS

TestVectors = Mapping[str, TestVector | TestVectorHeader]


class DirectionalDerivative(Scorer):
    """What the three methods share; a subclass says by its name which test vector is its own.

    A query named "sycophantic.L15" is the column ``"concept_influence.sycophantic.L15"``.

    Args:
        test_vectors: by method name; on the driver, which computes nothing, their headers will do.
        backend: "contraction", "forward", "difference", or "auto" (the fastest for the model and number of queries).
        reduction: the row's loss is the "mean" or the "sum" over its response tokens; as it was for H.

    Raises:
        ConfigError: no test vector for the method, an unknown backend or reduction.
    """

    def __init__(self, test_vectors: TestVectors, backend: str = "auto", reduction: str = "mean") -> None:
        if self.name not in test_vectors:
            raise ConfigError(
                f"the scorer {self.name!r} needs a test vector and none is given; run the fit job, or set query=…"
            )
        for option, value, known in (
            ("backend", backend, [*BACKENDS, "auto"]),
            ("reduction", reduction, ["mean", "sum"]),
        ):
            if value not in known:
                raise ConfigError(f"scorer.{self.name}.{option} is {value!r}{near(value, known)}")
        self._derivative = Derivative(test_vectors[self.name], backend, reduction)

    def needs(self) -> Needs:
        return Needs(derivatives=frozenset({self.name}))

    def derivative(self) -> Derivative:
        return self._derivative

    def columns(self) -> list[str]:
        return [f"{self.name}.{query}" for query in self._derivative.vector.names]

    def score(self, batch: Batch) -> Columns:
        found = batch.derivatives[self.name]
        return {column: as_column(found[:, i]) for i, column in enumerate(self.columns())}

    def fingerprint(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "columns": self.columns(),
            "test_vector": self._derivative.vector.digest,
            "reduction": self._derivative.reduction,
            "backend": self._derivative.backend,
        }


class InfluenceFunction(DirectionalDerivative):
    """f = -L of the queries: training on the row makes their responses likelier (paper A, eq. 1)."""

    name = "influence_function"


class ConceptInfluence(DirectionalDerivative):
    """f = the queries' mean projection on a concept: training on the row raises it (paper A, eq. 2)."""

    name = "concept_influence"


class GradientProduct(DirectionalDerivative):
    """H = I: the gradients' inner product, no curvature (paper A, eq. 7-9)."""

    name = "gradient_product"
