"""Difference: (L(θ+εs) - L(θ-εs)) / 2ε, two plain forwards a query (METHODS §2).

In: rows. Out: ⟨s, ∇⟩ of each row's summed loss, by token. No backward, no stored activations, any attention kernel; but
rounding is divided by ε, so half precision gives noise and is refused. The weights are moved in place for the time of
a pass and set back bit by bit from copies, whatever happens in between: no other thread may use the model meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from curate.errors import ConfigError
from curate.models import response_loss
from curate.models.pooling import span_mask
from curate.models.tap import LayerTap, head_logits
from curate.models.tracked import weight_of
from curate.scoring.directional.base import Backend, BatchSums, RowBatch, sum_dtype
from curate.scoring.directional.stacked import Stacked

# How far a step moves the layers' outputs, as a share of their size (see _reach): a larger one bends the loss (the
# error grows with its square), a smaller one drowns in rounding. Norms round to float32 in float64 models too.
_STEP = 2.5e-4
_ITERATIONS = 8


class Difference(Backend):
    """
    Raises:
        ConfigError: the model is in half precision.
    """

    name = "difference"

    def _take(self, vectors: Stacked) -> None:
        if self.model.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"the backend 'difference' needs float32 weights; the model is in {self.model.dtype}, whose rounding "
                f"is larger than the difference. Set model.dtype=float32, or choose 'contraction' or 'forward'."
            )
        self._tap = LayerTap(self.model, [self.n_blocks])
        self._vectors = vectors
        self._weights = {layer.name: weight_of(self.model.get_submodule(layer.name)) for layer in self.layers}
        self.steps = steps(vectors, self._weights)

    def _all(self, batches: Sequence[RowBatch]) -> list[BatchSums]:
        found: list[list[Tensor]] = [[] for _ in batches]
        for query, step in enumerate(self.steps):
            with self._moved(query, step):
                above = [self._losses(batch) for batch in batches]
            with self._moved(query, -step):
                for slopes, batch, high in zip(found, batches, above, strict=True):
                    slopes.append((high - self._losses(batch)) / (2 * step))
        sums = []
        for slopes in found:
            tokens = torch.stack(slopes, dim=-1)
            sums.append(BatchSums(tokens.sum(1), None, tokens if self.per_token else None))
        return sums

    def _batch(self, batch: RowBatch) -> BatchSums:
        return self._all([batch])[0]

    def _losses(self, batch: RowBatch) -> Float[Tensor, "batch tokens"]:
        last = self._tap(batch.inputs)[self.n_blocks]
        return token_losses(self.model, last, batch.ids, batch.starts, batch.ends)

    def _flops(self, lengths: Sequence[int], loss_tokens: int) -> float:
        return 2 * self.n_queries * self._cost.flops(lengths, None, loss_tokens)

    @contextmanager
    def _moved(self, query: int, step: float) -> Iterator[None]:
        """The model at θ + step·s within the block, at θ after it."""
        before = {name: weight.clone() for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                s = self._vectors.one(name, query)
                weight.add_(s.to(weight.device, weight.dtype), alpha=step)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.copy_(before[name])


def steps(vectors: Stacked, weights: Mapping[str, Tensor]) -> list[float]:
    """ε of every query, from its direction and the weights that it moves: {layer name: W [out, in]}."""
    # A direction of norm zero changes nothing, at any ε.
    reaches = (_reach(vectors, weights, query) for query in range(len(vectors.names)))
    return [_STEP / reach if reach > 0 else 1.0 for reach in reaches]


def _reach(vectors: Stacked, weights: Mapping[str, Tensor], query: int) -> float:
    """Root of Σ over layers of (largest singular value of S / typical one of W)².

    The size of s alone would not do: a gradient has few directions, a weight has many, so for one norm a gradient
    moves the layer's output by far more.
    """
    total = 0.0
    for name, weight in weights.items():
        s = vectors.one(name, query).to(weight.device, weight.dtype)
        x = torch.ones(s.shape[1], dtype=s.dtype, device=s.device)
        for _ in range(_ITERATIONS):
            x = s.T @ (s @ (x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)))
        typical = weight.norm() / min(weight.shape) ** 0.5
        total += float(x.norm() / typical.square())
    return math.sqrt(total)


@torch.no_grad()
def token_losses(
    model: PreTrainedModel,
    last: Float[Tensor, "batch tokens-1 d"],
    ids: Int[Tensor, "batch tokens"],
    starts: Sequence[int],
    ends: Sequence[int],
) -> Float[Tensor, "batch tokens"]:
    """-log p of every response token at its own position, zero elsewhere; float64, logits in chunks."""
    predicted = span_mask([max(start, 1) for start in starts], ends, ids.shape[1], last.device)
    states, targets = last[predicted[:, 1:]], ids[predicted]
    rows = max(1, response_loss._LOGITS // int(model.config.get_text_config().vocab_size))
    found = [
        F.cross_entropy(
            head_logits(model, states[i : i + rows]).to(sum_dtype(last.dtype)), targets[i : i + rows], reduction="none"
        )
        for i in range(0, len(states), rows)
    ]
    out = torch.zeros(ids.shape, dtype=torch.float64, device=last.device)
    out[predicted] = torch.cat(found).double()
    return out
