"""Batches of stored activations: nothing lost or doubled, mixed, the same from any step on, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import StorageError, TrainingError
from curate.training import activation_batches
from curate.training.activation_batches import ActivationBatches, Shard
from tests.training.sae_sample import write


def numbered(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32)[:, None].repeat(1, 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Shard]:
    return write(tmp_path_factory.mktemp("shards"), numbered(103), 10)


@given(st.integers(1, 60), st.integers(1, 120), st.integers(1, 3), st.integers(0, 4))
def test_an_epoch_is_a_permutation(shards, batch, buffer, epochs, seed):
    reader = ActivationBatches(shards, batch, buffer, epochs, seed)
    found = list(reader.batches())
    assert len(found) == reader.steps
    assert {len(b) for b in found[:-1]} <= {batch}
    stream = torch.cat(found)[:, 0]
    assert len(stream) == epochs * 103
    orders = set()
    for epoch in stream.split(103):
        assert torch.equal(epoch.sort().values, numbered(103)[:, 0])
        orders.add(tuple(epoch.tolist()))
    assert len(orders) == epochs


@pytest.mark.parametrize("batch", [7, 32, 200])
def test_from_any_step_on_they_are_the_same(shards, batch):
    reader = ActivationBatches(shards, batch, 25, 2, 3)
    whole = list(reader.batches())
    for first in range(len(whole)):
        for got, want in zip(reader.batches(first), whole[first:], strict=True):
            assert torch.equal(got, want)


def test_a_buffer_mixes_shards_and_no_more_than_two_are_held(shards, monkeypatch):
    real, read = activation_batches._read, []
    monkeypatch.setattr(activation_batches, "_read", lambda shard: read.append(shard) or real(shard))
    batches = ActivationBatches(shards, 15, 30, 1, 0).batches()
    first = next(batches)
    assert len({int(x) // 10 for x in first[:, 0]}) == 3
    batches.close()
    assert sum(s.tokens for s in read) <= 2 * 30


def test_what_cannot_be_read_is_said(shards, tmp_path):
    with pytest.raises(TrainingError, match="no activations"):
        ActivationBatches([], 8, 8, 1, 0)
    wrong = Shard(shards[0].url, 9)
    with pytest.raises(StorageError, match=r"shape \[10, 2\] where 9 tokens"):
        list(ActivationBatches([wrong], 8, 8, 1, 0).batches())
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="are broken"):
        list(ActivationBatches([Shard(str(tmp_path / "x.safetensors"), 1)], 8, 8, 1, 0).batches())
