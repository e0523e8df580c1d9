"""Directional derivatives of the examples' losses: score_i = -⟨s, ∇L_i⟩ = -d/dε L_i(θ + ε s) at ε = 0.

In: a model, a test vector of Q columns, tokenised rows. Out: [n, Q] scores; per block and per token where asked for.
No backend keeps a gradient by weights; `contraction` makes those of one layer and a few rows at once where dense
queries are many. They agree to rounding and differ in cost: `contraction` (one backward to the activations), `forward`
(tangents beside the values), `difference` (two plain forwards). Knows no method and no files.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.curvature.fisher import Reduction
from curate.curvature.test_vector import TestVector, TestVectorHeader
from curate.errors import ConfigError, CurvatureError, ModelError
from curate.models.batching import collate, token_batches
from curate.models.flops import model_cost
from curate.models.response_loss import loss_counts
from curate.models.tap import n_layers
from curate.models.tracked import is_linear, weight_of
from curate.scoring.base import PassStats
from curate.scoring.directional.stacked import Stacked


@dataclass(frozen=True)
class Derivatives:
    """What a backend returns, rows in input order; NaN for a row whose derivative is not finite.

    scores: -⟨s_q, ∇L_i⟩ [n, q].
    by_block: the share of each of the model's blocks in it [n, q, blocks]; they sum to the score.
    tokens: one array [tokens of the row, q] a row; they sum to the score too. What a token's entry says depends on
        the backend: its own loss changes by it (forward, difference; zero where there is no loss), or what the
        gradient gathers at its position (contraction).
    """

    scores: NDArray[np.float64]
    by_block: NDArray[np.float64] | None
    tokens: list[NDArray[np.float32]] | None
    stats: PassStats


@dataclass(frozen=True)
class RowBatch:
    """Rows padded on the right. `ids` leave out nothing; the states of `inputs` are all that the loss reads."""

    ids: Int[Tensor, "batch tokens"]
    starts: Sequence[int]
    ends: Sequence[int]

    @property
    def inputs(self) -> Int[Tensor, "batch tokens-1"]:
        """What the model must see: nothing is predicted from a row's last token."""
        return self.ids[:, :-1]

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class BatchSums:
    """Derivatives of a batch's *summed* losses, +⟨s, ∇⟩, on the model's device.

    `blocks` [batch, q, blocks] and `tokens` [batch, tokens, q] are None unless asked for.
    """

    scores: Float[Tensor, "batch q"]
    blocks: Float[Tensor, "batch q blocks"] | None = None
    tokens: Float[Tensor, "batch tokens q"] | None = None


class Backend(ABC):
    """One way to the directional derivatives of one test vector, or of several, whose queries come one after another.

    Args:
        model: in eval mode, no weight asking for gradients.
        test_vector: not to be written to as long as the backend is in use, which may share its memory.
        max_tokens: token budget of a batch, padding included. Lower it if memory runs out; scores stay the same.
        pad_id: any valid token id; no real token sees the padding.
        reduction: L_i is the mean or the sum of the row's response losses.
        per_token, by_block: also return the parts of each score.

    Raises:
        CurvatureError: a layer of the test vector is not in the model, or has another shape.
        ConfigError: a budget below 1, or a part of the scores that this backend cannot give.
        ModelError: the model's weights ask for gradients.
    """

    name: str
    gives_blocks = False

    def __init__(
        self,
        model: PreTrainedModel,
        test_vector: TestVector | Sequence[TestVector],
        max_tokens: int = 8192,
        pad_id: int = 0,
        reduction: Reduction = "mean",
        per_token: bool = False,
        by_block: bool = False,
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"the token budget of a batch is {max_tokens}; it must be at least 1")
        if reduction not in ("mean", "sum"):
            raise ConfigError(f"the reduction of the loss is {reduction!r}; choose 'mean' or 'sum'")
        if by_block and not self.gives_blocks:
            raise ConfigError(f"the backend {self.name!r} does not split scores by block; choose 'contraction'")
        if any(p.requires_grad for p in model.parameters()):
            raise ModelError("the model's weights require gradients; call model.requires_grad_(False) first")
        vectors = [test_vector] if isinstance(test_vector, TestVector) else list(test_vector)
        for vector in vectors:
            check_layers(model, vector)
        stacked = Stacked(vectors)
        self.model, self.device = model, model.device
        self.names, self.layers = stacked.names, stacked.layers
        self.lowest = min(layer.block for layer in self.layers)
        self.n_queries, self.n_blocks = len(self.names), n_layers(model)
        self.max_tokens, self.pad_id, self.reduction = max_tokens, pad_id, reduction
        self.per_token, self.by_block = per_token, by_block
        self._cost = model_cost(model)
        self._take(stacked)

    @abstractmethod
    def _take(self, vectors: Stacked) -> None:
        """Keep of `vectors` what the derivatives are made with, and not what there is a copy of by then."""

    def run(self, rows: Sequence[Rendered]) -> Derivatives:
        """Scores of `rows`, in batches of like lengths. A row without a token that carries the loss scores NaN."""
        began = time.perf_counter()
        counts = loss_counts([r.start for r in rows], [r.end for r in rows])
        index = [i for i, count in enumerate(counts) if count > 0]
        scores = np.full((len(rows), self.n_queries), np.nan)
        blocks = np.full((*scores.shape, self.n_blocks), np.nan) if self.by_block else None
        tokens = (
            [np.full((len(r.input_ids), self.n_queries), np.nan, np.float32) for r in rows] if self.per_token else None
        )
        stats = PassStats()
        batches = [[index[i] for i in b] for b in token_batches([rows[i].end for i in index], self.max_tokens)]
        parts = self._all([self._collate([rows[i] for i in batch]) for batch in batches])
        for batch, sums in zip(batches, parts, strict=True):
            divisor = np.array([float(counts[i]) if self.reduction == "mean" else 1.0 for i in batch])
            scores[batch] = -_host(sums.scores) / divisor[:, None]
            if blocks is not None and sums.blocks is not None:
                blocks[batch] = -_host(sums.blocks) / divisor[:, None, None]
            if tokens is not None and sums.tokens is not None:
                values = -_host(sums.tokens) / divisor[:, None, None]
                for i, found in zip(batch, values, strict=True):
                    here = min(len(tokens[i]), len(found))
                    tokens[i][:here], tokens[i][here:] = found[:here], 0.0
            stats += PassStats(padded_tokens=len(batch) * max(rows[i].end for i in batch), batches=1)
        scores[~np.isfinite(scores)] = np.nan
        lengths = [rows[i].end for i in index]
        stats += PassStats(
            rows=len(rows),
            tokens=sum(lengths),
            seconds=time.perf_counter() - began,
            flops=self._flops(lengths, sum(counts[i] for i in index)),
        )
        return Derivatives(scores, blocks, tokens, stats)

    def _collate(self, rows: Sequence[Rendered]) -> RowBatch:
        ids, _ = collate([r.input_ids[: r.end] for r in rows], self.pad_id, "right", self.device)
        return RowBatch(ids, [r.start for r in rows], [r.end for r in rows])

    def _all(self, batches: Sequence[RowBatch]) -> list[BatchSums]:
        """The derivatives of every batch."""
        return [self._batch(batch) for batch in batches]

    @abstractmethod
    def _batch(self, batch: RowBatch) -> BatchSums:
        """The derivatives of one batch."""

    @abstractmethod
    def _flops(self, lengths: Sequence[int], loss_tokens: int) -> float:
        """FLOPs of the derivatives of rows of `lengths` tokens, `loss_tokens` of them in the loss."""

    def _flops_of_backward(self, lengths: Sequence[int], loss_tokens: int) -> float:
        """One forward, and one backward to the activations of the lowest block."""
        forward = self._cost.flops(lengths, None, loss_tokens)
        return forward + self._cost.gradient_flops(lengths, self.lowest, loss_tokens)


def check_layers(model: PreTrainedModel, vector: TestVector | TestVectorHeader) -> None:
    """
    Raises:
        CurvatureError: a layer of `vector` is no linear layer of the model, or has another shape there.
    """
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    who = f"the test vector of {', '.join(vector.names)}"
    for layer in vector.layers:
        module = modules.get(layer.name)
        if module is None or not is_linear(module):
            raise CurvatureError(
                f"{who} has a block for the layer {layer.name!r}, which {type(model).__name__} has not (or not as a "
                f"linear layer). It was made of another model, or its adapter is merged here and was not there: make "
                f"the test vector again."
            )
        shape = tuple(weight_of(module).shape)
        if shape != (layer.out, layer.width):
            raise CurvatureError(
                f"{who} has a block of the shape {(layer.out, layer.width)} for {layer.name!r}, whose weight here is "
                f"{shape}. It was made of another model: make the test vector again."
            )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _host(values: Tensor) -> NDArray[Any]:
    return values.detach().to(device="cpu", dtype=torch.float64).numpy()
