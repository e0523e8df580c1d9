"""Gradient cosine: cos(−∇L_i, ∇f), how far a step on the row goes the behaviour's way, whatever the gradients' sizes.

In: a test vector made with H = I (∇f itself), rows. Out: a column a behaviour, from −1 to 1. With f = −L of a test item
it is the cosine of the two loss gradients: what candidates are pre-filtered by before influence on latents (METHODS
§5). Numerator and norms come from one backward, without a gradient of the row (directional/cosine.py says how).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.curvature.fisher import Reduction
from curate.errors import CurvatureError
from curate.models.batching import collate, token_batches
from curate.models.linear_tap import LinearTap
from curate.models.response_loss import loss_counts, summed_response_loss
from curate.models.tracked import TrackedLayer
from curate.scoring.directional.base import sum_dtype
from curate.scoring.directional.cosine import Cosine, SquaredNorms
from curate.scoring.influence import DirectionalDerivative, TestVectors


class GradientCosine(DirectionalDerivative):
    """cos(−∇L_i, ∇f) over the tracked layers that a behaviour reaches; NaN for a row whose gradient is zero."""

    name = "gradient_cosine"

    def __init__(self, test_vectors: TestVectors, reduction: str = "mean") -> None:
        super().__init__(test_vectors, "auto", reduction)
        self._derivative = replace(self._derivative, backend=Cosine.name)


def gradient_norms(
    model: PreTrainedModel,
    layers: Sequence[TrackedLayer],
    rows: Sequence[Rendered],
    max_tokens: int = 8192,
    pad_id: int = 0,
    reduction: Reduction = "mean",
) -> Float[NDArray[np.float64], " n"]:
    """‖∇L_i‖ over `layers`, exact, of rows in input order; NaN for a row without a response token.

    One forward and one backward to the activations. `max_tokens`: of a batch, padding included.

    Raises:
        ConfigError, ModelError: see LinearTap.
    """
    tap = LinearTap(model, layers)
    counts = loss_counts([r.start for r in rows], [r.end for r in rows])
    index = [i for i, n in enumerate(counts) if n > 0]
    found = np.full(len(rows), np.nan)
    norms = SquaredNorms()
    for batch in token_batches([rows[i].end for i in index], max_tokens):
        here = [index[i] for i in batch]
        ids, _ = collate([rows[i].input_ids[: rows[i].end] for i in here], pad_id, device=model.device)
        squares = torch.zeros(len(here), dtype=sum_dtype(model.dtype), device=model.device)
        spans = [rows[i].start for i in here], [rows[i].end for i in here]

        def add(layer: TrackedLayer, a: Tensor, delta: Tensor, squares: Tensor = squares) -> None:
            squares += norms(layer, a, delta)

        def loss(last: Tensor, ids: Tensor = ids, spans: Any = spans) -> Tensor:
            return summed_response_loss(model, last, ids, *spans)

        tap.backward(ids[:, :-1], loss, add)
        norms.clear()
        sizes = squares.sqrt().double().cpu().numpy()
        found[here] = sizes / [counts[i] if reduction == "mean" else 1 for i in here]
    return found


def candidates(
    cosines: Float[NDArray[np.float64], "n q"], keep: float | None, at_least: float | None = None
) -> list[NDArray[np.int64]]:
    """The rows with the largest cosine, best first, for every item; rows of equal cosine in input order.

    Args:
        cosines: NaN where a row has none: it is no candidate.
        keep: a share of the rows (below 1; at least one row is kept), a count (1 or more), or None: all.
        at_least: rows of a smaller cosine are left out as well.

    Raises:
        CurvatureError: `keep` is neither, or an item (its column is named) is left without a candidate.
    """
    n = len(cosines)
    if keep is not None and not (0 < keep < 1 or (keep >= 1 and float(keep).is_integer())):
        raise CurvatureError(f"keep={keep} of the pre-filter is neither a share between 0 and 1 nor a whole number")
    most = n if keep is None else max(1, round(keep * n)) if keep < 1 else int(keep)
    found = []
    for q in range(cosines.shape[1]):
        column = cosines[:, q]
        good = np.isfinite(column) & (column >= (-np.inf if at_least is None else at_least))
        order = np.argsort(np.where(good, -column, np.inf), kind="stable")[: min(most, int(good.sum()))]
        if not len(order):
            largest = np.nanmax(column) if np.isfinite(column).any() else float("nan")
            raise CurvatureError(
                f"the pre-filter leaves no candidate for item {q}: of {n} rows {int(np.isfinite(column).sum())} have a "
                f"cosine, the largest is {largest:.3g}"
                + (f", and {at_least:g} is asked for; lower it" if at_least is not None else "")
            )
        found.append(order.astype(np.int64))
    return found
