"""Which rows make which step: a plan that is the same for any number of workers, and the collator.

In: the rows' lengths and a TrainingSpec. Out: for one worker, row numbers batch by batch over all epochs. A step's rows
are `batch_size` rows in an order shuffled by (seed, epoch); the last step of an epoch has what is left. Within a step
rows of like length go together, so that little is padded: the step's loss and gradient are sums over its rows and do
not depend on it. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from curate.models.batching import collate
from curate.training.spec import TrainingSpec

if TYPE_CHECKING:
    from datasets import Dataset

NO_LOSS = -100  # the label that Hugging Face's Trainer does not count


class StepPlan:
    """The steps of a training, as a batch sampler for worker `rank`: every step has the same number of batches for
    every worker, empty ones where its rows do not suffice."""

    def __init__(self, lengths: Int[np.ndarray, " rows"], spec: TrainingSpec, rank: int = 0) -> None:
        self.lengths, self.spec, self.rank = lengths, spec, rank
        self.micro, self.accumulation = spec.accumulation
        self.per_epoch = -(-len(lengths) // spec.batch_size)
        self.steps = spec.epochs * self.per_epoch

    def __len__(self) -> int:
        """Batches of this worker."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self._steps():
            yield from self.share(rows)

    def _steps(self) -> Iterator[np.ndarray]:
        for epoch in range(self.spec.epochs):
            order = np.random.default_rng([self.spec.seed, epoch]).permutation(len(self.lengths))
            for at in range(0, len(order), self.spec.batch_size):
                yield order[at : at + self.spec.batch_size]

    def share(self, rows: Int[np.ndarray, " step"]) -> list[list[int]]:
        """This worker's batches of a step, `accumulation` of them: longest rows first."""
        ordered = rows[np.argsort(-self.lengths[rows], kind="stable")]
        batches = [ordered[at : at + self.micro].tolist() for at in range(0, self.spec.batch_size, self.micro)]
        return batches[self.rank :: self.spec.workers]

    def sums(self, of_rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " steps"]:
        """Of a number that each row has, the sum over every step's rows, of all workers."""
        return np.array([of_rows[rows].sum() for rows in self._steps()])


class BatchRows:
    """The rows of a batch, fetched together, as a map-style dataset whose items are batches."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[list[int], int]]:
        """(token ids, where the response starts) of some rows."""
        if not numbers:
            return []
        found = self.rows[list(numbers)]
        return list(zip(found["input_ids"], found["start"], strict=True))


def make_batch(rows: Sequence[tuple[Sequence[int], int]]) -> dict[str, Any]:
    """input_ids and labels [rows, longest row], padded on the right; labels are NO_LOSS but for the response.

    An empty batch is one row of one token without loss. There is no attention mask: in a causal model no token sees
    the padding after it.
    """
    if not rows:
        return {"input_ids": torch.zeros((1, 1), dtype=torch.long), "labels": torch.full((1, 1), NO_LOSS)}
    ids, mask = collate([ids for ids, _ in rows], 0)
    labels: Tensor = ids.masked_fill(mask == 0, NO_LOSS)
    for label, (_, start) in zip(labels, rows, strict=True):
        label[: max(start, 1)] = NO_LOSS
    return {"input_ids": ids, "labels": labels}
