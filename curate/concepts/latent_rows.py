"""Rows of sparse latent activations, and how those of many rows are summed without a dense table.

In: blocks of rows as compressed sparse rows. Out: counts and sums per latent. Knows no model, no SAE and no files.
Activations are above 0; a latent that did not fire on a row is not stored there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

Tokens = Literal["response", "all"]
Statistic = Literal["max", "mean"]


@dataclass(frozen=True, eq=False)
class LatentRows:
    """`values` [b, h]: one activation a row and latent (its mean or its maximum over the row's tokens). `rows` [b]: the
    rows' numbers in the whole corpus."""

    rows: Int[np.ndarray, " b"]
    values: csr_array


Blocks = Callable[[], Iterator[LatentRows]]
"""The rows of a corpus, block by block, as often as they are asked for."""


def latent_rows(
    rows: Int[np.ndarray, " b"],
    lengths: Int[np.ndarray, " b"],
    latents: Int[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
    h: int,
) -> LatentRows:
    """From the flattened lists of a table; `lengths` says how many entries each row has."""
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return LatentRows(rows, csr_array((values, latents, indptr), shape=(len(rows), h)))


def above(block: LatentRows, threshold: float) -> LatentRows:
    """The same rows with the activations above `threshold` alone."""
    v = block.values
    kept = v.data > threshold
    of_row = np.repeat(np.arange(v.shape[0]), np.diff(v.indptr))
    lengths = np.bincount(of_row[kept], minlength=v.shape[0])
    return latent_rows(block.rows, lengths, v.indices[kept], v.data[kept], v.shape[1])


@dataclass(frozen=True, eq=False)
class Sums:
    """Of the rows of each class c and of each latent: how often it fires, Σ a and Σ a². `rows`: of each class."""

    rows: Int[np.ndarray, " c"]
    fired: Int[np.ndarray, "c h"]
    total: Float[np.ndarray, "c h"]
    squares: Float[np.ndarray, "c h"]


def sums(blocks: Blocks, classes: Int[np.ndarray, " rows"], names: Sequence[str], h: int) -> Sums:
    """One pass. `classes` [rows of the corpus]: an index into `names`, or -1 for rows that do not count."""
    c = len(names)
    counted = np.zeros(c, np.int64)
    fired, total, squares = np.zeros((c, h), np.int64), np.zeros((c, h)), np.zeros((c, h))
    for block in blocks():
        of = classes[block.rows]
        counted += np.bincount(of[of >= 0], minlength=c)
        entry = np.repeat(of, np.diff(block.values.indptr))
        kept = entry >= 0
        at = entry[kept] * h + block.values.indices[kept]
        a = block.values.data[kept].astype(np.float64)
        fired += np.bincount(at, minlength=c * h).reshape(c, h)
        total += np.bincount(at, a, minlength=c * h).reshape(c, h)
        squares += np.bincount(at, a * a, minlength=c * h).reshape(c, h)
    return Sums(counted, fired, total, squares)


def strongest(blocks: Blocks, latents: Int[np.ndarray, " m"], n: int, h: int) -> list[list[tuple[int, float]]]:
    """The `n` rows on which each of `latents` is strongest, as (row, activation), falling; ties by row.

    At most n rows a latent and those of one block are held.
    """
    place = np.full(h, -1, np.int64)
    place[latents] = np.arange(len(latents))
    kept = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))  # place, row, activation
    for block in blocks():
        of_row = np.repeat(block.rows, np.diff(block.values.indptr))
        of = place[block.values.indices]
        mine: Bool[np.ndarray, " n"] = of >= 0
        found = (of[mine], of_row[mine], block.values.data[mine].astype(np.float64))
        at, row, a = (np.concatenate(pair) for pair in zip(kept, found, strict=True))
        order = np.lexsort((row, -a, at))
        at, row, a = at[order], row[order], a[order]
        first = np.searchsorted(at, at)
        top = np.arange(len(at)) - first < n
        kept = at[top], row[top], a[top]
    out: list[list[tuple[int, float]]] = [[] for _ in latents]
    for p, row, a in zip(*(x.tolist() for x in kept), strict=True):
        out[p].append((row, a))
    return out
