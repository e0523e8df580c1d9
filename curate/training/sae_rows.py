"""Steps of an SAE that also learns from the model's own loss: rows of the corpus, read by the model as they come.

In: a frozen model, tokenised rows, a layer. Out: steps whose states are the model's at that layer, with the loss of its
responses when it goes on from the reconstructions of all tokens (paper B: joint training). Stored states would not do:
the loss needs whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from curate.models.batching import collate, token_batches
from curate.models.pooling import span_mask
from curate.models.response_loss import loss_counts, summed_response_loss
from curate.models.splice import downstream
from curate.models.tap import LayerTap
from curate.training.rows import row_lengths
from curate.training.sae_settings import SaeSettings
from curate.training.sae_trainer import SAMPLE, Micro

if TYPE_CHECKING:
    from datasets import Dataset


class RowSteps:
    """A step has as many whole rows, in an order shuffled by (seed, epoch), as reach `batch_tokens`. `rows` end with
    the end of turn: with tokens=response, that one is learnt from too. `token_budget`: padded tokens at once."""

    def __init__(
        self, model: PreTrainedModel, layer: int, rows: Dataset, settings: SaeSettings, token_budget: int
    ) -> None:
        self.model, self.layer, self.rows, self.settings = model, layer, rows, settings
        self.tap, self.token_budget = LayerTap(model, [layer]), token_budget
        self.lengths = row_lengths(rows)
        counted = self.lengths
        if settings.tokens == "response":
            counted = counted - np.array(rows["start"])
        self.tokens = int(counted.sum())

    @cached_property
    def plan(self) -> list[np.ndarray]:
        """The rows of every step."""
        steps = []
        for epoch in range(self.settings.epochs):
            order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.lengths))
            ends = np.cumsum(self.lengths[order])
            number = (ends - self.lengths[order]) // self.settings.batch_tokens
            steps += np.split(order, np.flatnonzero(np.diff(number)) + 1)
        return steps

    @property
    def steps(self) -> int:
        return len(self.plan)

    def sample(self) -> Float[Tensor, "n d"]:
        """The states of the first steps."""
        found: list[Tensor] = []
        for parts in self.after(0):
            found += [p.x if p.wanted is None else p.x[p.wanted] for p in parts]
            if sum(len(x) for x in found) >= SAMPLE:
                break
        return torch.cat(found).float().cpu()

    def after(self, first: int) -> Iterator[Sequence[Micro]]:
        for rows in self.plan[first:]:
            batches = token_batches(self.lengths[rows].tolist(), self.token_budget)
            yield [self._part(rows[np.asarray(batch)]) for batch in batches]

    def _part(self, numbers: np.ndarray) -> Micro:
        found = self.rows[numbers.tolist()]
        starts, ends = list(found["start"]), [len(ids) for ids in found["input_ids"]]
        ids, mask = collate(found["input_ids"], 0, device=self.model.device)
        states = self.tap(ids)[self.layer]
        real = mask.bool()
        wanted = None
        if self.settings.tokens == "response":
            wanted = span_mask(starts, ends, ids.shape[1], ids.device)[real]

        def task(rebuilt: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
            x = torch.zeros_like(states).masked_scatter(real[..., None], rebuilt.to(states.dtype))
            return summed_response_loss(self.model, downstream(self.model, self.layer, x), ids, starts, ends)

        return Micro(states[real].float(), wanted, task, sum(loss_counts(starts, ends)))
