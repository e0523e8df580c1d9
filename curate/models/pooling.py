"""Pooling: one vector a row from the hidden states of its response tokens. Knows no model and no batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def span_mask(
    starts: Sequence[int], stops: Sequence[int], tokens: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "batch {tokens}"]:
    """True at positions starts[i] ≤ t < stops[i].

    Raises:
        ValueError: a span is empty or leaves the row: such rows belong in quarantine, not here.
    """
    for i, (a, b) in enumerate(zip(starts, stops, strict=True)):
        if not 0 <= a < b <= tokens:
            raise ValueError(f"span [{a}, {b}) of row {i} is empty or outside its {tokens} tokens")
    at = torch.arange(tokens, device=device)
    first = torch.as_tensor(starts, device=device)[:, None]
    last = torch.as_tensor(stops, device=device)[:, None]
    return (at >= first) & (at < last)


def response_sum(
    hidden: Float[Tensor, "batch tokens d"], starts: Sequence[int], stops: Sequence[int]
) -> Float[Tensor, "batch d"]:
    """Σ_t h_t over [start, stop), in float32 whatever the model's precision."""
    mask = span_mask(starts, stops, hidden.shape[1], hidden.device)
    # where, not a product with the mask: padding may hold infinities, and 0·∞ is NaN.
    return torch.where(mask[..., None], hidden.float(), 0.0).sum(1)


def response_mean(
    hidden: Float[Tensor, "batch tokens d"], starts: Sequence[int], stops: Sequence[int]
) -> Float[Tensor, "batch d"]:
    """a_l(x, y): the mean of h_t over the response tokens [start, stop), accumulated in float32 (paper A §3)."""
    counts = torch.as_tensor([b - a for a, b in zip(starts, stops, strict=True)], device=hidden.device)
    return response_sum(hidden, starts, stops) / counts[:, None]
