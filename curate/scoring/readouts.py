"""Readouts: what scorers read of single tokens, pooled over each row's response before it leaves the pass.

In: hidden states of a batch, response spans. Out: one number a row and column. Knows no model and no scorer's method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curate.models.pooling import span_mask
from curate.scoring.base import Readout

_CHUNK = 2**24  # numbers of a readout that are held at once: 64 MiB in float32


def pooled_readout(
    readout: Readout, hidden: Float[Tensor, "batch tokens d"], starts: Sequence[int], stops: Sequence[int]
) -> Float[Tensor, "batch m"]:
    """The mean or maximum of `readout.read` over the response tokens [start, stop) of every row, in float32."""
    mask = span_mask(starts, stops, hidden.shape[1], hidden.device)
    states, rows = hidden[mask], mask.nonzero()[:, 0]
    worst = 0.0 if readout.pooling == "mean" else -torch.inf
    out = torch.full((hidden.shape[0], readout.columns), worst, dtype=torch.float32, device=hidden.device)
    step = max(1, _CHUNK // max(readout.most, hidden.shape[2]))
    for i in range(0, len(states), step):
        found = readout.read(states[i : i + step]).float()
        if readout.pooling == "mean":
            out.index_add_(0, rows[i : i + step], found)
        else:
            out.scatter_reduce_(0, rows[i : i + step, None].expand_as(found), found, "amax")
    return out / mask.sum(1, keepdim=True) if readout.pooling == "mean" else out
