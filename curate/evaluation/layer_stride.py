"""Layer-stride study: how well scores over every s-th tracked block rank the rows as scores over all of them do.

In: each block's share in each row's score. Out: rank correlations by stride, for every query. Knows no model.

The curvature is block-diagonal by layer, so a layer's share of a score does not change when other layers are left out:
the scores at stride s are sums over fewer blocks, and one pass over the rows answers for every stride. Stride s takes
the first tracked block and every s-th after it (as LayerChoice.stride does); with the other s − 1 blocks to begin
with, the correlations show how much of it is luck. (Paper A: above 0.9 up to a stride of 5 or 6 on most sets.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from curate.errors import ConfigError

MAX_STRIDE = 12


@dataclass(frozen=True)
class Stride:
    """One stride: `blocks`, those used when it begins with the first tracked one; for every query the rank correlation
    with stride 1 of these (`correlation`), and the lowest and highest over all blocks to begin with. NaN where one of
    the two scores is the same for all rows."""

    stride: int
    blocks: tuple[int, ...]
    correlation: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]


@dataclass(frozen=True)
class LayerStrides:
    """The study of `rows` rows: `names` of the queries, the tracked blocks, one Stride each from 1 up."""

    names: tuple[str, ...]
    rows: int
    blocks: tuple[int, ...]
    strides: tuple[Stride, ...]

    def largest(self, level: float = 0.9) -> tuple[int, ...]:
        """For every query the largest stride up to which no correlation falls below `level`."""
        found = []
        for q in range(len(self.names)):
            good = 1
            for s in self.strides:
                if not s.correlation[q] >= level:
                    break
                good = s.stride
            found.append(good)
        return tuple(found)


def layer_strides(
    by_block: Float[np.ndarray, "rows queries blocks"],
    names: Sequence[str],
    max_stride: int | None = None,
) -> LayerStrides:
    """
    Args:
        by_block: shares that sum to the scores; blocks that are not tracked are zero everywhere. Rows that hold a NaN
            (not scored) are left out.
        max_stride: None: MAX_STRIDE, or the number of tracked blocks where that is less.

    Raises:
        ConfigError: another number of names than of queries, fewer than 3 rows, no block with a share, or a stride
            that is not between 1 and the number of tracked blocks.
    """
    if by_block.ndim != 3 or by_block.shape[1] != len(names):
        raise ConfigError(f"shares of the shape {by_block.shape} do not fit the {len(names)} queries; want [n, q, b]")
    shares = by_block[np.isfinite(by_block).all(axis=(1, 2))].astype(np.float64)
    if len(shares) < 3:
        raise ConfigError(f"a layer-stride study needs at least 3 scored rows, found {len(shares)}")
    touched = np.flatnonzero((shares != 0).any(axis=(0, 1)))
    if not len(touched):
        raise ConfigError("no block has a share in any score; the test vector is zero")
    # Whole spacing is kept: a tracked block whose share happens to be zero is still one.
    step = int(np.gcd.reduce(np.diff(touched))) if len(touched) > 1 else 1
    blocks = np.arange(touched[0], touched[-1] + 1, step)
    last = min(MAX_STRIDE, len(blocks)) if max_stride is None else max_stride
    if not 1 <= last <= len(blocks):
        raise ConfigError(f"the largest stride is {last}; choose from 1 to the {len(blocks)} tracked blocks")
    whole = [rankdata(shares[:, q].sum(1)) for q in range(len(names))]

    def correlations(used: np.ndarray) -> list[float]:
        return [_correlation(whole[q], rankdata(shares[:, q, used].sum(1))) for q in range(len(names))]

    strides = []
    for s in range(1, last + 1):
        each = np.array([correlations(blocks[first::s]) for first in range(s)])
        low, high = (tuple(f(each[:, q]) for q in range(len(names))) for f in (_least, _most))
        strides.append(Stride(s, tuple(int(b) for b in blocks[::s]), tuple(each[0].tolist()), low, high))
    return LayerStrides(tuple(names), len(shares), tuple(int(b) for b in blocks), tuple(strides))


def _correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def _least(values: Float[np.ndarray, " n"]) -> float:
    return float(np.nanmin(values)) if np.isfinite(values).any() else float("nan")


def _most(values: Float[np.ndarray, " n"]) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")
