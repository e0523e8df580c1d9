"""FLOPs of a fit's two passes, beside those of the model itself: for the share of a device's peak.

In: tracked layers and counts of tokens, without padding. Out: FLOPs, one multiply-add = 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from curate.corpus.render import Rendered
from curate.curvature.fisher import CurvatureSpec
from curate.models.flops import ForwardCost
from curate.models.response_loss import loss_counts
from curate.models.tracked import TrackedLayer


def fisher_flops(
    cost: ForwardCost, layers: Sequence[TrackedLayer], spec: CurvatureSpec, rendered: Sequence[Rendered]
) -> tuple[float, int]:
    """(FLOPs, tokens) of the forward over `rendered` and of the backward to the lowest tracked layer."""
    lengths = [len(r.input_ids) if spec.tokens == "all" else r.end for r in rendered]
    losses = sum(loss_counts([r.start for r in rendered], [r.end for r in rendered]))
    lowest = min(layer.block for layer in layers)
    return cost.flops(lengths, None, losses) + cost.gradient_flops(lengths, lowest, losses), sum(lengths)


def covariance_flops(layers: Sequence[TrackedLayer], tokens: int) -> float:
    """Σ a aᵀ of every input that is read and Σ δ δᵀ of every layer."""
    return 2.0 * tokens * squares(layers)


def correction_flops(layers: Sequence[TrackedLayer], tokens: int, rotated: bool) -> float:
    """Σ_t δ_t a_tᵀ of every layer; `rotated`: with tokens brought into the eigenbases before."""
    bases = squares(layers) if rotated else 0
    return 2.0 * tokens * (bases + sum(layer.out * layer.width for layer in layers))


def squares(layers: Sequence[TrackedLayer]) -> int:
    """Σ n² over A of every input that is read, and B of every layer."""
    inputs = {layer.reads: layer.width for layer in layers}
    return sum(n * n for n in [*inputs.values(), *(layer.out for layer in layers)])
