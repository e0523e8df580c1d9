"""Influence scores: influence function (paper A, eq. 1), concept influence (eq. 2), gradient product (eq. 7-9).

score(z) = -⟨s, ∇L(z)⟩ with s = H⁻¹∇f: up to first order, what training on z adds to the behaviour f. f is minus the
loss of the queries, the projection on a concept, or what the gradient product compares with; H = I for the gradient
product. f and H are in the test vector, which was made before; what is left is one directional derivative of the row's
loss, and that comes from directional/. Several queries are several columns of one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curate.curvature.test_vector import TestVector, TestVectorHeader
from curate.errors import ConfigError, near
from curate.scoring.base import Batch, Columns, Derivative, Needs, Scorer, as_column
from curate.scoring.directional.make import BACKENDS

TestVectors = Mapping[str, TestVector | TestVectorHeader]


@dataclass(frozen=True)
class _Queries:
    """One method's test vector as columns: ``"concept_influence.sycophantic.L15"`` for the behaviour
    ``"sycophantic.L15"``."""

    method: str
    derivative: Derivative

    @property
    def columns(self) -> list[str]:
        return [f"{self.method}.{name}" for name in self.derivative.vector.names]

    def score(self, batch: Batch) -> Columns:
        found = batch.derivatives[self.method]
        return {column: as_column(found[:, i]) for i, column in enumerate(self.columns)}

    def fingerprint(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "columns": self.columns,
            "test_vector": self.derivative.vector.digest,
            "reduction": self.derivative.reduction,
            "backend": self.derivative.backend,
        }


def _queries(method: str, test_vectors: TestVectors, backend: str, reduction: str) -> _Queries:
    if method not in test_vectors:
        raise ConfigError(
            f"the scorer {method!r} needs a test vector and none is given; run the fit job, or set query=…"
        )
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"scorer.{method}.backend is {backend!r}{near(backend, [*BACKENDS, 'auto'])}")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"scorer.{method}.reduction is {reduction!r}{near(reduction, ['mean', 'sum'])}")
    return _Queries(method, Derivative(test_vectors[method], backend, reduction))


class InfluenceFunction(Scorer):
    """f = -L of the queries: training on the row makes their responses likelier (paper A, eq. 1).

    backend: "contraction", "forward", "difference", or "auto" (the fastest for the model and the number of queries).
    reduction: the row's loss is the "mean" or the "sum" over its response tokens; as it was for H.
    """

    name = "influence_function"

    def __init__(self, test_vectors: TestVectors, backend: str = "auto", reduction: str = "mean") -> None:
        self.queries = _queries(self.name, test_vectors, backend, reduction)

    def needs(self) -> Needs:
        return Needs(derivatives=frozenset({self.name}))

    def derivative(self) -> Derivative:
        return self.queries.derivative

    def columns(self) -> list[str]:
        return self.queries.columns

    def score(self, batch: Batch) -> Columns:
        return self.queries.score(batch)

    def fingerprint(self) -> dict[str, Any]:
        return self.queries.fingerprint()


class ConceptInfluence(Scorer):
    """f = the queries' mean projection on a concept: training on the row raises it (paper A, eq. 2).

    Settings as of InfluenceFunction.
    """

    name = "concept_influence"

    def __init__(self, test_vectors: TestVectors, backend: str = "auto", reduction: str = "mean") -> None:
        self.queries = _queries(self.name, test_vectors, backend, reduction)

    def needs(self) -> Needs:
        return Needs(derivatives=frozenset({self.name}))

    def derivative(self) -> Derivative:
        return self.queries.derivative

    def columns(self) -> list[str]:
        return self.queries.columns

    def score(self, batch: Batch) -> Columns:
        return self.queries.score(batch)

    def fingerprint(self) -> dict[str, Any]:
        return self.queries.fingerprint()


class GradientProduct(Scorer):
    """H = I: the gradients' inner product, no curvature (paper A, eq. 7-9).

    Settings as of InfluenceFunction.
    """

    name = "gradient_product"

    def __init__(self, test_vectors: TestVectors, backend: str = "auto", reduction: str = "mean") -> None:
        self.queries = _queries(self.name, test_vectors, backend, reduction)

    def needs(self) -> Needs:
        return Needs(derivatives=frozenset({self.name}))

    def derivative(self) -> Derivative:
        return self.queries.derivative

    def columns(self) -> list[str]:
        return self.queries.columns

    def score(self, batch: Batch) -> Columns:
        return self.queries.score(batch)

    def fingerprint(self) -> dict[str, Any]:
        return self.queries.fingerprint()
