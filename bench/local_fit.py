"""EK-FAC in one process, by the parts that the distributed fit is made of: for benchmarks that need factors at once.

In: a model, tracked layers, tokenised rows. Out: a Factor a layer, and the CPU seconds of each phase. Stores nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.ekfac import (
    Bases,
    Corrections,
    Damping,
    Eigenbasis,
    Factor,
    accumulate_corrections,
    eigenbasis,
    make_factor,
)
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.queries import Query
from curate.curvature.test_vector import TestVector, solve_all
from curate.models.tracked import TrackedLayer


class LocalFit:
    """`factors` by layer name; `seconds`: CPU seconds of "covariance", "eigen" and "correction"."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[TrackedLayer],
        spec: CurvatureSpec,
        rows: Sequence[Rendered],
        ids: Sequence[str],
        token_budget: int = 1024,
        pad_id: int = 0,
    ) -> None:
        self.factors: dict[str, Factor] = {}
        self.seconds: dict[str, float] = {}
        self._began = time.process_time()
        if spec.kind == "identity":
            self.factors = {layer.name: Factor(layer, "identity") for layer in layers}
            return
        pass_args = (rows, ids, token_budget, pad_id)
        bases = None
        if spec.kind != "diagonal":
            sums = accumulate_covariances(model, layers, spec, *pass_args, Covariances())
            self._phase("covariance")
            inputs: dict[str, Eigenbasis] = {}
            outputs: dict[str, Eigenbasis] = {}
            for layer in layers:  # a covariance is dropped as soon as it has its eigenvectors
                if layer.reads not in inputs:
                    inputs[layer.reads] = eigenbasis(sums.input_factor(layer.reads), layer.reads)
                    del sums.tensors[f"A/{layer.reads}"]
                outputs[layer.name] = eigenbasis(sums.output_factor(layer.name), layer.name)
                del sums.tensors[f"B/{layer.name}"]
            bases = Bases(inputs, outputs)
            self._phase("eigen")
        corrections = Corrections()
        if spec.kind != "kfac":
            accumulate_corrections(model, layers, spec, bases, *pass_args, corrections)
            self._phase("correction")
        for layer in layers:
            q_in = None if bases is None else bases.inputs[layer.reads]
            q_out = None if bases is None else bases.outputs[layer.name]
            values = None if spec.kind == "kfac" else corrections.eigenvalues(layer.name)
            self.factors[layer.name] = make_factor(layer, spec.kind, q_in, q_out, values)

    def _phase(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] = now - self._began
        self._began = now

    def mean_eigenvalue(self) -> float:
        """Mean of all layers' eigenvalues, to set an absolute damping by."""
        values = [f.eigenvalues for f in self.factors.values() if f.eigenvalues is not None]
        return sum(float(v.sum()) for v in values) / sum(v.numel() for v in values)


def loss_vector(
    model: PreTrainedModel,
    layers: Sequence[TrackedLayer],
    fit: LocalFit,
    queries: Sequence[Rendered],
    damping: Damping,
    reduction: str = "mean",
) -> TestVector:
    """H⁻¹∇f with f = −L(queries), as the classic influence function has it."""
    from curate.curvature.behaviour import BehaviourSpec, make_behaviour, query_gradients

    behaviour = make_behaviour(BehaviourSpec("loss"), None, reduction)  # type: ignore[arg-type]
    asked = [Query(str(i), q) for i, q in enumerate(queries)]
    gradients = query_gradients(model, layers, [behaviour], asked, 0)
    return solve_all(gradients, layers, lambda layer: fit.factors[layer.name], damping)
