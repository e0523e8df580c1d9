"""Batches of stored activations: every token once an epoch, mixed from several shards, in bounded memory.

In: shards (URL and number of tokens). Out: tensors [batch, d] from any step on, the same ones whenever they are asked
for. Within an epoch the shards come in an order of chance; as many as fit the buffer are read together and their tokens
shuffled. Batches run on over groups and epochs, so that only the very last one may be shorter. In memory are two
buffers: the one that is used and the next one, which is read meanwhile. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from connectors import storage
from curate.errors import StorageError, TrainingError


@dataclass(frozen=True)
class Shard:
    """A safetensors file with "x" [tokens, d]."""

    url: str
    tokens: int


@dataclass(frozen=True)
class _Group:
    """Shards that are read and shuffled together. `first`: its place in the stream of all tokens of all epochs."""

    epoch: int
    number: int
    shards: tuple[Shard, ...]
    first: int

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.shards)


class ActivationBatches:
    """See the module's docstring. `buffer_tokens`: how many are shuffled together; at least one shard's."""

    def __init__(self, shards: Sequence[Shard], batch_tokens: int, buffer_tokens: int, epochs: int, seed: int) -> None:
        """
        Raises:
            TrainingError: no tokens.
        """
        self.shards = tuple(shards)
        self.tokens = sum(s.tokens for s in shards)
        if not self.tokens:
            raise TrainingError("there are no activations to train on: every row was held out or quarantined")
        self.batch_tokens, self.buffer_tokens = batch_tokens, buffer_tokens
        self.epochs, self.seed = epochs, seed
        self.steps = -(-epochs * self.tokens // batch_tokens)

    def sample(self) -> Float[Tensor, "n d"]:
        """The first group's states: for what is learnt of the data before training."""
        return self._load(next(self._groups(0)))

    def batches(self, first: int = 0) -> Iterator[Float[Tensor, "batch d"]]:
        """Batch `first` (counted from 0) and those after it."""
        at = first * self.batch_tokens
        held: list[Tensor] = []
        have = 0
        with ThreadPoolExecutor(1) as pool:
            groups = self._groups(at)
            ahead = _next(pool, self._load, groups)
            while ahead is not None:
                group, loading = ahead
                states = loading.result()
                ahead = _next(pool, self._load, groups)
                states = states[max(0, at - group.first) :]
                while have + len(states) >= self.batch_tokens:
                    need = self.batch_tokens - have
                    yield torch.cat([*held, states[:need]])
                    held, have, states = [], 0, states[need:]
                if len(states):
                    held, have = [*held, states.clone()], have + len(states)
                del states, loading
            if have:
                yield torch.cat(held)

    def _groups(self, place: int) -> Iterator[_Group]:
        """The groups from the one on that holds the `place`-th token of the stream."""
        for epoch in range(place // self.tokens, self.epochs):
            first = epoch * self.tokens
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
            group: list[Shard] = []
            number = 0
            for i in [*order.tolist(), None]:
                size = sum(s.tokens for s in group)
                if group and (i is None or size + self.shards[i].tokens > self.buffer_tokens):
                    found = _Group(epoch, number, tuple(group), first)
                    if found.first + size > place:
                        yield found
                    first, number, group = first + size, number + 1, []
                if i is not None:
                    group.append(self.shards[i])

    def _load(self, group: _Group) -> Float[Tensor, "n d"]:
        states = torch.cat([_read(shard) for shard in group.shards])
        order = np.random.default_rng([self.seed, group.epoch, 1 + group.number]).permutation(len(states))
        return states[torch.from_numpy(order)]


def _next(
    pool: ThreadPoolExecutor, load: Callable[[_Group], Tensor], groups: Iterator[_Group]
) -> tuple[_Group, Future[Tensor]] | None:
    """The next group, under way."""
    group = next(groups, None)
    return None if group is None else (group, pool.submit(load, group))


def _read(shard: Shard) -> Float[Tensor, "n d"]:
    """
    Raises:
        StorageError: it cannot be read, or holds another number of tokens than was written.
    """
    try:
        x = safetensors.torch.load(storage.read_bytes(shard.url))["x"]
    except (SafetensorError, KeyError) as e:
        raise StorageError(f"the activations {shard.url} are broken ({e}); remove their folder and run again") from None
    if x.ndim != 2 or x.shape[0] != shard.tokens:
        raise StorageError(
            f"the activations {shard.url} have the shape {list(x.shape)} where {shard.tokens} tokens were written; "
            f"remove their folder and run again"
        )
    return x
