"""Layer strides: sums over fewer blocks, correlated by SciPy; what cannot be ranked is said."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from curate.errors import ConfigError
from curate.evaluation.layer_stride import layer_strides


def shares(n: int = 60, queries: int = 2, blocks: int = 9, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, queries, blocks)) + 0.7 * rng.normal(size=(n, queries, 1))


def test_each_stride_is_scipys_rank_correlation_of_the_summed_shares():
    by_block = shares()
    found = layer_strides(by_block, ["a", "b"])
    assert [s.stride for s in found.strides] == list(range(1, 10))
    assert found.blocks == tuple(range(9))
    for s in found.strides:
        assert s.blocks == tuple(range(0, 9, s.stride))
        for q in range(2):
            whole = by_block[:, q].sum(1)
            each = [spearmanr(whole, by_block[:, q, k :: s.stride].sum(1)).statistic for k in range(s.stride)]
            assert s.correlation[q] == pytest.approx(each[0], abs=1e-12)
            assert (s.lowest[q], s.highest[q]) == pytest.approx((min(each), max(each)), abs=1e-12)


def test_stride_one_agrees_wholly_and_rows_without_a_score_are_left_out():
    by_block = shares()
    by_block[7] = np.nan
    found = layer_strides(by_block, ["a", "b"], max_stride=2)
    assert found.rows == 59
    assert found.strides[0].correlation == pytest.approx((1.0, 1.0))


def test_only_tracked_blocks_are_strided():
    by_block = np.zeros((40, 1, 12))
    by_block[..., 2:10:2] = shares(40, 1, 4)
    found = layer_strides(by_block, ["a"])
    assert found.blocks == (2, 4, 6, 8)
    assert found.strides[1].blocks == (2, 6)


def test_a_block_without_a_share_between_others_still_counts_as_tracked():
    by_block = shares(40, 1, 6)
    by_block[..., 3] = 0
    assert layer_strides(by_block, ["a"]).blocks == tuple(range(6))


def test_the_largest_stride_above_a_level():
    rng = np.random.default_rng(1)
    common = rng.normal(size=(200, 1, 1))
    by_block = np.concatenate([common + 0.05 * rng.normal(size=(200, 1, 8)), rng.normal(size=(200, 1, 8))], axis=1)
    found = layer_strides(by_block, ["alike", "unlike"])
    assert found.largest(0.9) == (8, 1)


def test_a_query_whose_score_does_not_vary_has_no_correlation():
    by_block = shares(30, 2, 4)
    by_block[:, 1] = 0.5
    found = layer_strides(by_block, ["a", "b"])
    assert all(np.isnan(s.correlation[1]) for s in found.strides)
    assert found.largest()[1] == 1


@pytest.mark.parametrize(
    ("by_block", "names", "stride", "told"),
    [
        (shares(queries=1), ["a", "b"], None, "do not fit the 2 queries"),
        (shares(2), ["a", "b"], None, "at least 3 scored rows, found 2"),
        (np.zeros((9, 1, 4)), ["a"], None, "no block has a share"),
        (shares(blocks=4), ["a", "b"], 5, "from 1 to the 4 tracked blocks"),
        (shares(blocks=4), ["a", "b"], 0, "the largest stride is 0"),
    ],
)
def test_what_cannot_be_studied_is_refused(by_block, names, stride, told):
    with pytest.raises(ConfigError, match=told):
        layer_strides(by_block, names, stride)
