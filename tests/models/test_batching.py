"""Token budgets, padding and pooling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.errors import ConfigError
from curate.models.batching import collate, token_batches
from curate.models.pooling import response_mean, response_sum, span_mask


def test_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    for budget in (1, 64, 512, 10**6):
        batches = token_batches(lengths, budget)
        assert sorted(i for b in batches for i in b) == list(range(500))
        for b in batches:
            longest = max(lengths[i] for i in b)
            assert len(b) * longest <= budget or len(b) == 1


def test_little_is_padded():
    lengths = np.random.default_rng(1).integers(10, 1000, 2000).tolist()
    padded = sum(len(b) * max(lengths[i] for i in b) for b in token_batches(lengths, 8192))
    assert padded < 1.05 * sum(lengths)


def test_edges():
    assert token_batches([], 10) == []
    assert token_batches([50, 3, 3], 10) == [[0], [1, 2]]
    assert token_batches([2, 2, 2], 4) == [[0, 1], [2]]
    with pytest.raises(ConfigError, match="at least 1"):
        token_batches([1], 0)


def test_collate_sides():
    ids, mask = collate([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = collate([[1, 2, 3], [4]], pad_id=9, side="left")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_mean_against_a_loop():
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 4)
    starts, stops = [0, 2, 6], [7, 5, 7]
    got = response_mean(hidden, starts, stops)
    for i, (a, b) in enumerate(zip(starts, stops, strict=True)):
        np.testing.assert_allclose(got[i].numpy(), hidden[i, a:b].numpy().mean(0), rtol=1e-6)
    torch.testing.assert_close(response_sum(hidden, starts, stops)[1], hidden[1, 2:5].sum(0))


def test_mean_is_float32_and_blind_to_padding():
    hidden = torch.full((1, 3000, 2), 1.001, dtype=torch.bfloat16)
    exact = float(hidden[0, 0, 0])
    hidden[0, 2500:] = float("nan")
    got = response_mean(hidden, [0], [2500])
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), exact, rtol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (3, 2), (-1, 2), (0, 6)])
def test_bad_spans_are_refused(start, stop):
    with pytest.raises(ValueError, match="row 0"):
        span_mask([start], [stop], 5)
