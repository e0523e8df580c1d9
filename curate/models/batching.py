"""Batches by token budget: rows of like length together, so that little is padded.

In: lengths, or lists of token ids. Out: lists of row indices, or padded tensors. Knows no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from curate.errors import ConfigError


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut rows into batches whose padded size (rows × longest row) is at most `max_tokens`.

    A row longer than the budget is a batch of its own. Longest first, so that a budget too large for the memory
    shows at once; rows of one length stay in input order.

    Raises:
        ConfigError: `max_tokens` is less than 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"the token budget of a batch is {max_tokens}; it must be at least 1")
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def collate(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    side: Literal["left", "right"] = "right",
    device: torch.device | str = "cpu",
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Pad to the longest row: (input_ids, attention_mask), int64, mask 1 at real tokens.

    Score with padding on the right (positions then need no correction); generate with padding on the left.
    """
    longest = max((len(r) for r in rows), default=0)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, span] = torch.as_tensor(row, dtype=torch.long)
        mask[i, span] = 1
    return ids.to(device), mask.to(device)
