"""Sums over blocks of sparse rows against dense tables."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from curate.concepts.latent_rows import LatentRows, above, latent_rows, strongest, sums


def dense_rows(n: int = 40, h: int = 13, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.round(rng.exponential(size=(n, h)), 1) * (rng.random((n, h)) < rng.random(h))


def in_blocks(table: np.ndarray, size: int = 7, numbers: np.ndarray | None = None):
    numbers = np.arange(len(table)) if numbers is None else numbers

    def blocks():
        for a in range(0, len(table), size):
            yield LatentRows(numbers[a : a + size], csr_array(table[a : a + size]))

    return blocks


def test_a_block_from_flattened_lists():
    block = latent_rows(np.array([4, 9, 5]), np.array([2, 0, 1]), np.array([0, 3, 1]), np.array([1.0, 2.0, 3.0]), 5)
    assert block.values.toarray().tolist() == [[1, 0, 0, 2, 0], [0] * 5, [0, 3, 0, 0, 0]]
    kept = above(block, 1.5)
    assert kept.values.toarray().tolist() == [[0, 0, 0, 2, 0], [0] * 5, [0, 3, 0, 0, 0]]
    assert kept.rows.tolist() == [4, 9, 5]
    assert above(block, 3.0).values.nnz == 0  # above, not at


def test_sums_are_those_of_the_dense_table():
    table, rng = dense_rows(), np.random.default_rng(1)
    of = rng.integers(-1, 3, len(table))
    found = sums(in_blocks(table), of, ("a", "b", "c"), table.shape[1])
    for c in range(3):
        mine = table[of == c]
        assert found.rows[c] == len(mine)
        np.testing.assert_array_equal(found.fired[c], (mine > 0).sum(0))
        np.testing.assert_allclose(found.total[c], mine.sum(0))
        np.testing.assert_allclose(found.squares[c], (mine**2).sum(0))


def test_the_strongest_rows_whatever_the_blocks():
    table = dense_rows()
    numbers = np.random.default_rng(2).permutation(1000)[: len(table)]
    wanted = np.array([5, 0, 12])
    expected = []
    for j in wanted:
        pairs = [(int(numbers[i]), float(table[i, j])) for i in range(len(table)) if table[i, j] > 0]
        expected.append(sorted(pairs, key=lambda p: (-p[1], p[0]))[:4])
    for size in (1, 7, 100):
        assert strongest(in_blocks(table, size, numbers), wanted, 4, table.shape[1]) == expected
