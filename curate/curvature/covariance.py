"""Covariances of K-FAC: A = E[a aᵀ] of a layer's inputs and B = E[Σ_t δ_t δ_tᵀ] of its output gradients.

In: a model and examples. Out: sums that can be stored and added. Knows no eigenvectors.

A is a mean over counted tokens, B over examples of the sum over tokens, so that A ⊗ B and the second moment of G_i =
Σ_t δ_t a_tᵀ are on one scale. Layers that read one input (q, k, v) share one A, under the name of the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.curvature.fisher import CurvatureSpec, FisherBatch, fisher_pass
from curate.curvature.sums import Sums
from curate.errors import CurvatureError
from curate.models.tracked import TrackedLayer


class Covariances(Sums):
    """Σ a aᵀ at "A/<reads>" with the count "tokens"; Σ δ δᵀ at "B/<layer>" with the count "examples"."""

    def input_factor(self, reads: str) -> Float[Tensor, "in in"]:
        """A of the layers that read what `reads` reads.

        Raises:
            CurvatureError: nothing was summed.
        """
        return self._mean(f"A/{reads}", "tokens")

    def output_factor(self, name: str) -> Float[Tensor, "out out"]:
        """B of the layer `name`.

        Raises:
            CurvatureError: nothing was summed.
        """
        return self._mean(f"B/{name}", "examples")

    def _mean(self, key: str, count: str) -> Tensor:
        n = self.counts.get(count, 0)
        if key not in self.tensors or n < 1:
            raise CurvatureError(f"there is no sum {key!r} over {count}: no example was seen, or of other layers")
        return self.tensors[key] / n


def accumulate_covariances(
    model: PreTrainedModel,
    layers: Sequence[TrackedLayer],
    spec: CurvatureSpec,
    rendered: Sequence[Rendered],
    ids: Sequence[str],
    max_tokens_batch: int,
    pad_id: int,
    into: Covariances,
) -> Covariances:
    """Add the sums of these examples to `into`, which is returned. Arguments and errors as in `fisher_pass`."""
    keys = [f"B/{layer.name}" for layer in layers]
    seen: set[str] = set()

    def add(batch: FisherBatch, layer: TrackedLayer, a: Tensor, delta: Tensor) -> None:
        if layer.reads not in seen:
            seen.add(layer.reads)
            rows = a[batch.counted]
            total = into.at(f"A/{layer.reads}", (layer.width, layer.width), rows)
            rows = rows.to(total.dtype)
            total.addmm_(rows.T, rows)
        rows = delta.flatten(0, 1)
        into.at(f"B/{layer.name}", (layer.out, layer.out), rows).addmm_(rows.T, rows)
        if layer is layers[0]:
            into.count("tokens", int(batch.counted.sum()))

    def after() -> bool:
        seen.clear()
        return into.finite(keys)

    fisher_pass(model, layers, spec, rendered, ids, max_tokens_batch, pad_id, add, after)
    into.count("examples", len(rendered))
    return into
