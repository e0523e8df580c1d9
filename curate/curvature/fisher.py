"""The Fisher's ingredients: for every tracked layer the inputs a and the output gradients δ of a list of examples.

In: a model, tracked layers, rendered examples. Out: calls with a and δ, batch by batch. Does not know what they are
summed to.

The curvature is that of the example's loss L, the mean ("mean") or the sum ("sum") of its response tokens'
cross-entropies, and G_i = Σ_t δ_t a_tᵀ is a draw from it: with labels sampled from the model, the cross terms of two
tokens vanish in expectation, and so the gradient of the sum, divided by √n_i, has the Fisher of the mean as its second
moment ("mean": (1/n_i) Σ_t F_t; "sum": Σ_t F_t). With the data's labels it is ∇L_i itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.curvature.labels import sampled_response_loss
from curate.errors import ConfigError, CurvatureError, near
from curate.models.batching import collate, token_batches
from curate.models.engines import row_seed
from curate.models.linear_tap import LinearTap
from curate.models.response_loss import loss_counts, predicting_mask, summed_response_loss
from curate.models.tracked import LayerChoice, TrackedLayer

CurvatureKind = Literal["ekfac", "kfac", "diagonal", "identity"]
Fisher = Literal["sampled", "empirical"]
Counted = Literal["loss", "all"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class CurvatureSpec:
    """What the curvature is made of. Damping is no part of it: it belongs to the solve.

    kind: EK-FAC, K-FAC, the diagonal of the Fisher, or the identity (no fit).
    fisher: labels sampled from the model (the true Fisher) or those of the data (the empirical one).
    tokens: which tokens count in A = E[a aᵀ]: "all", every token of the row; "loss", those whose states predict a
        token of the loss. δ counts wherever it is not zero, and attention carries it to the prompt as well: with "all",
        no gradient reaches a direction in which A is zero, and so it does not matter how that null space is spanned.
    reduction: whether an example's loss is the mean or the sum over its response tokens.
    examples: rows to fit on, at most. max_tokens: longer rows are left out or cut, as the renderer decides.
    """

    kind: CurvatureKind = "ekfac"
    fisher: Fisher = "sampled"
    tokens: Counted = "all"
    reduction: Reduction = "mean"
    examples: int = 5000
    max_tokens: int = 1536
    seed: int = 0
    layers: LayerChoice = field(default_factory=LayerChoice)

    def __post_init__(self) -> None:
        for name, known in (
            ("kind", CurvatureKind), ("fisher", Fisher), ("tokens", Counted), ("reduction", Reduction)
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in get_args(known):
                raise ConfigError(f"the curvature's {name} is {value!r}{near(value, get_args(known))}")
        if self.examples < 1:
            raise ConfigError(f"the curvature is to be fitted on {self.examples} examples; it needs at least 1")
        if self.max_tokens < 2:
            raise ConfigError(f"the curvature's max_tokens is {self.max_tokens}; it must be at least 2")


@dataclass(frozen=True)
class FisherBatch:
    """One batch on its way through the model. `counted`: the tokens that count in A. `scale`: of δ, row by row."""

    counted: Bool[Tensor, "batch tokens"]
    scale: Float[Tensor, "batch 1 1"]


# a [batch, tokens, in] in the model's precision; δ [batch, tokens, out] in float32 or better, scaled.
OnFisher = Callable[[FisherBatch, TrackedLayer, Tensor, Tensor], None]


def fisher_pass(
    model: PreTrainedModel,
    layers: Sequence[TrackedLayer],
    spec: CurvatureSpec,
    rendered: Sequence[Rendered],
    ids: Sequence[str],
    max_tokens_batch: int,
    pad_id: int,
    on_layer: OnFisher,
    after_batch: Callable[[], bool] = lambda: True,
) -> None:
    """Call `on_layer(batch, layer, a, δ)` for every tracked layer of every batch.

    Args:
        ids: the examples' ids, which seed their labels.
        max_tokens_batch: padded tokens of a batch, at most (a longer row is a batch of its own).
        after_batch: called when a batch is through; False means that its sums are not finite.

    Raises:
        CurvatureError: an example has no token with a loss, or a gradient that is not finite; names it.
    """
    tap = LinearTap(model, layers)
    # What stands behind the end of turn has no loss and, as attention is causal, no influence on what has.
    rows = [r.input_ids if spec.tokens == "all" else r.input_ids[: r.end] for r in rendered]
    for name, row in zip(ids, rendered, strict=True):
        if row.end <= max(row.start, 1):
            raise CurvatureError(f"the example {name!r} has no response token to take a loss of")
    for batch in token_batches([len(row) for row in rows], max_tokens_batch):
        tokens, mask = collate([rows[i] for i in batch], pad_id, device=model.device)
        starts, ends = [rendered[i].start for i in batch], [rendered[i].end for i in batch]
        seeds = [row_seed(spec.seed, ids[i]) for i in batch]
        predicting = predicting_mask(starts, ends, tokens.shape[1], tokens.device)
        sizes = [_scale(spec, n) for n in loss_counts(starts, ends)]
        scale = torch.tensor(sizes, dtype=torch.float64, device=tokens.device)[:, None, None]
        about = FisherBatch(predicting if spec.tokens == "loss" else mask.bool(), scale)

        def objective(
            last: Tensor,
            tokens: Tensor = tokens,
            starts: Sequence[int] = starts,
            ends: Sequence[int] = ends,
            seeds: Sequence[int] = seeds,
        ) -> Tensor:
            if spec.fisher == "sampled":
                return sampled_response_loss(model, last, starts, ends, seeds)
            return summed_response_loss(model, last, tokens, starts, ends)

        def scaled(layer: TrackedLayer, a: Tensor, delta: Tensor, about: FisherBatch = about) -> None:
            # In float32: in half precision a long row's small gradients would be lost by the division.
            delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
            delta = delta * about.scale.to(delta.dtype)
            on_layer(about, layer, a, delta)

        value = tap.backward(tokens, objective, scaled)
        if not bool(torch.isfinite(value)) or not after_batch():
            names = ", ".join(repr(ids[i]) for i in batch[:8]) + (", …" if len(batch) > 8 else "")
            raise CurvatureError(
                f"the gradients of the example{'s' if len(batch) > 1 else ''} {names} are not finite (loss "
                f"{float(value):.4g}). Load the model in float32 or bfloat16, or leave such rows out."
            )


def _scale(spec: CurvatureSpec, n: int) -> float:
    if spec.reduction == "sum":
        return 1.0
    return 1 / math.sqrt(n) if spec.fisher == "sampled" else 1 / n
