"""One pass: scorers that need the same forward share it.

In: a model, scorers, examples with their tokens. Out: every scorer's columns in input order, and what it cost.
Rows are sorted by length and cut by a token budget; the forward stops at the highest layer that anyone asks for; with
gradients it is one forward and one backward down to the lowest layer asked for, with the loss at response tokens only.
Derivatives along test vectors are a pass of their own, in the finetuned model, that all methods' queries share.
Scores do not depend on how rows are batched (to rounding). Knows no files, no parts and no cluster.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from curate.corpus.example import Example
from curate.corpus.render import Rendered
from curate.errors import ConfigError
from curate.models.batching import collate, token_batches
from curate.models.flops import ForwardCost, model_cost
from curate.models.pooling import response_mean, response_sum
from curate.models.response_loss import loss_counts, summed_response_loss
from curate.models.tap import LayerTap, width
from curate.scoring.base import Batch, Columns, Needs, PassStats, Scorer
from curate.scoring.directional.joint import Joint, joint_passes
from curate.scoring.readouts import pooled_readout

K = TypeVar("K", int, str)
# Rows whose pooled vectors are held at once: 4,096 rows of width 4,096 are 64 MiB a layer.
_WINDOW = 4096


@dataclass(frozen=True)
class PassResult:
    """`columns[name]` [n] float64 in input order; NaN where a row could not be scored."""

    columns: Columns
    stats: PassStats


class SharedPass:
    """Runs `scorers` over examples with one model.

    Args:
        model: needed if a scorer asks for activations or gradients; in eval mode, no weight asking for gradients.
        max_tokens: token budget of a batch, padding included. Lower it if memory runs out; scores stay the same.
        gradient_tokens: the same for passes that take gradients, which keep more of a token; None: `max_tokens`.
        pad_id: any valid token id; padding is masked.
        tuned: the finetuned model, in which derivatives along test vectors are taken; None: `model` itself.

    Raises:
        ConfigError: no model where one is needed, or a budget below 1.
        ModelError: a layer that the model does not have.
        CurvatureError: a test vector that does not fit the finetuned model.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        scorers: Sequence[Scorer],
        max_tokens: int = 8192,
        pad_id: int = 0,
        tuned: PreTrainedModel | None = None,
        gradient_tokens: int | None = None,
    ) -> None:
        self.max_tokens, self.gradient_tokens = max_tokens, max_tokens if gradient_tokens is None else gradient_tokens
        for budget in (self.max_tokens, self.gradient_tokens):
            if budget < 1:
                raise ConfigError(f"the token budget of a batch is {budget}; it must be at least 1")
        self.scorers = list(scorers)
        self.needs = Needs.union(s.needs() for s in self.scorers)
        self.pad_id = pad_id
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tap: LayerTap | None = None
        self._own_tap: LayerTap | None = None
        self._cost: ForwardCost | None = None
        self._joint: list[Joint] = []
        if self.needs.base:
            if model is None:
                asking = [s.name for s in self.scorers if s.needs().base]
                raise ConfigError(f"the scorer {asking[0]!r} needs a model and none is given; set model=…")
            self.model = model
            self.device = model.device
            self._cost = model_cost(model)
            if layers := self.needs.layers | self.needs.gradients | self.needs.states:
                self._tap = LayerTap(model, layers)
            if self.needs.generated:
                self._own_tap = LayerTap(model, self.needs.generated)
        if self.needs.tuned:
            differentiated = model if tuned is None else tuned
            if differentiated is None:
                asking = [s.name for s in self.scorers if s.needs().tuned]
                raise ConfigError(f"the scorer {asking[0]!r} needs a model and none is given; set model=…")
            self._joint = joint_passes(differentiated, self.scorers, self.gradient_tokens, pad_id)
            if not self.needs.base:
                self.device = differentiated.device
        for scorer in self.scorers:
            scorer.prepare(self.device)
        self._readouts = [r for s in self.scorers for r in s.readouts()]

    def columns(self) -> list[str]:
        """All columns, in the order of the scorers."""
        return [c for s in self.scorers for c in s.columns()]

    def run(
        self,
        examples: Sequence[Example],
        rendered: Sequence[Rendered] | None = None,
        generated: Sequence[Rendered | None] | None = None,
    ) -> PassResult:
        """Score rows. `rendered[i]` are the tokens of `examples[i]`, `generated[i]` those of the base model's own
        response to the same prompt, or None if there is none.

        Raises:
            ConfigError: tokens or generated responses are needed and not given.
            ValueError: the arguments differ in length, or a scorer returns something else than its columns.
        """
        if self.needs.rendered and rendered is None:
            raise ConfigError(f"the scorers {[s.name for s in self.scorers]} need tokenised rows and got none")
        if self.needs.generated and generated is None:
            asking = [s.name for s in self.scorers if s.needs().generated]
            raise ConfigError(
                f"the scorer {asking[0]!r} needs the base model's own responses; run the generate job first and set "
                f"generated=…"
            )
        for other in (rendered, generated):
            if other is not None and len(other) != len(examples):
                raise ValueError(f"{len(other)} tokenised rows for {len(examples)} examples")
        columns: Columns = {name: np.full(len(examples), np.nan) for name in self.columns()}
        stats = PassStats()
        for start in range(0, len(examples), _WINDOW):
            span = slice(start, start + _WINDOW)
            found, cost = self._window(
                examples[span],
                None if rendered is None else rendered[span],
                None if generated is None else generated[span],
            )
            stats += cost
            for name, values in found.items():
                columns[name][span] = values
        return PassResult(columns, stats)

    def _window(
        self,
        examples: Sequence[Example],
        rendered: Sequence[Rendered] | None,
        generated: Sequence[Rendered | None] | None,
    ) -> tuple[Columns, PassStats]:
        began = time.perf_counter()
        stats = PassStats()
        pooled: dict[int, Tensor] = {}
        own: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        reads: dict[str, Tensor] = {}
        if self._tap is not None and rendered is not None:
            if self.needs.gradients:
                pooled, gradients, cost = self._with_gradients(rendered, reads)
            else:
                pooled, cost = self._pooled(self._tap, self.needs.layers, rendered, reads)
            stats += cost
        if self._own_tap is not None and generated is not None:
            own, cost = self._pooled(self._own_tap, self.needs.generated, generated)
            stats += cost
        derivatives: dict[str, Tensor] = {}
        for joint in self._joint:
            assert rendered is not None  # run() has seen to it
            found, cost = joint(rendered)
            derivatives.update(found)
            stats += replace(cost, rows=0, seconds=0.0)  # both are those of the window, below
        batch = Batch(examples, rendered, pooled, own, gradients, derivatives, reads)
        columns: Columns = {}
        for scorer in self.scorers:
            columns.update(_checked(scorer, batch))
        # Scores on the host have waited for the device, so the clock is right.
        return columns, stats + PassStats(rows=len(examples), seconds=time.perf_counter() - began)

    def _batches(
        self, lengths: Sequence[int], rows: Sequence[Rendered], budget: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(row indices, input_ids), padded on the right; only the first `lengths[i]` tokens of a row."""
        for index in token_batches(lengths, budget):
            ids, _ = collate([rows[i].input_ids[: lengths[i]] for i in index], self.pad_id, "right", self.device)
            yield index, ids

    def _pooled(
        self,
        tap: LayerTap,
        layers: frozenset[int],
        rows: Sequence[Rendered | None],
        reads: dict[str, Tensor] | None = None,
    ) -> tuple[dict[int, Float[Tensor, "n d"]], PassStats]:
        """a_l of every row at `layers`; NaN for a row that is None. Fills `reads`, if given, with the readouts."""
        there = [i for i, r in enumerate(rows) if r is not None]
        real = [r for r in rows if r is not None]
        lengths = [r.stop for r in real]  # attention is causal: what follows the response cannot change it
        found: dict[int, Tensor] = {}
        stats = self._stats(lengths, tap.layers[-1], 0)
        for index, ids in self._batches(lengths, real, self.max_tokens):
            spans = [real[i].start for i in index], [real[i].stop for i in index]
            states = tap(ids)
            for layer in layers:
                _put(found, layer, [there[i] for i in index], response_mean(states[layer], *spans), len(rows))
            if reads is not None:
                self._read(states, *spans, index, len(rows), reads)
            stats += PassStats(padded_tokens=ids.numel(), batches=1)
        for layer in layers if not found else ():
            found[layer] = torch.full((len(rows), width(self.model)), torch.nan, device=self.device)
        return found, stats

    def _read(
        self,
        states: Mapping[int, Float[Tensor, "batch tokens d"]],
        starts: Sequence[int],
        stops: Sequence[int],
        index: list[int],
        n: int,
        reads: dict[str, Tensor],
    ) -> None:
        for readout in self._readouts:
            _put(reads, readout.name, index, pooled_readout(readout, states[readout.layer], starts, stops), n)

    def _with_gradients(
        self, rows: Sequence[Rendered], reads: dict[str, Tensor]
    ) -> tuple[dict[int, Float[Tensor, "n d"]], dict[int, Float[Tensor, "n d"]], PassStats]:
        """a_l, and ∂L/∂a_l = Σ_t ∂L/∂h_t over response tokens, L the row's mean cross-entropy (paper A, eq. 12)."""
        assert self._tap is not None
        lengths = [r.end for r in rows]
        pooled: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        counts = loss_counts([r.start for r in rows], [r.end for r in rows])
        stats = self._stats(lengths, None, sum(counts))
        for index, ids in self._batches(lengths, rows, self.gradient_tokens):
            starts, stops = [rows[i].start for i in index], [rows[i].stop for i in index]
            ends = [rows[i].end for i in index]

            def loss(last: Tensor, ids: Tensor = ids, starts: Any = starts, ends: Any = ends) -> Tensor:
                return summed_response_loss(self.model, last, ids, starts, ends)

            states, slopes = self._tap.grad_forward(ids, None, self.needs.gradients, loss)
            for layer in self.needs.layers:
                _put(pooled, layer, index, response_mean(states[layer], starts, stops), len(rows))
            self._read(states, starts, stops, index, len(rows), reads)
            tokens = torch.tensor([counts[i] for i in index], dtype=torch.float32, device=self.device)
            for layer, slope in slopes.items():
                _put(gradients, layer, index, response_sum(slope, starts, stops) / tokens[:, None], len(rows))
            stats += PassStats(padded_tokens=ids.numel(), batches=1)
        return pooled, gradients, stats

    def _stats(self, lengths: Sequence[int], layer: int | None, loss_tokens: int) -> PassStats:
        assert self._cost is not None
        flops = self._cost.flops(lengths, layer, loss_tokens)
        if loss_tokens:
            flops += self._cost.gradient_flops(lengths, min(self.needs.gradients), loss_tokens)
        return PassStats(tokens=sum(lengths), flops=flops)


def _put(into: dict[K, Tensor], key: K, index: list[int], rows: Float[Tensor, "batch d"], n: int) -> None:
    """Write a batch's vectors to their places in [n, d], on the device: no wait for it after every batch."""
    if key not in into:
        into[key] = torch.full((n, rows.shape[1]), torch.nan, dtype=torch.float32, device=rows.device)
    into[key][torch.as_tensor(index, device=rows.device)] = rows


def _checked(scorer: Scorer, batch: Batch) -> Columns:
    """The scorer's columns, or ValueError: a method that returns anything else is a mistake in that method."""
    found = scorer.score(batch)
    if list(found) != scorer.columns():
        raise ValueError(f"{scorer.name} returned the columns {list(found)}, expected {scorer.columns()}")
    for name, values in found.items():
        if values.shape != (len(batch),) or values.dtype != np.float64:
            raise ValueError(f"{name}: {values.dtype} {values.shape}, expected float64 ({len(batch)},)")
    return found
