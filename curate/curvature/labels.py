"""Labels of the Fisher: sampled from the model's own prediction (the true Fisher), or the data's (the empirical one).

In: last hidden states and spans. Out: a scalar that autograd can go through. Knows no layer below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from curate.models.response_loss import loss_counts, summed_cross_entropy


def sampled_response_loss(
    model: PreTrainedModel,
    last: Float[Tensor, "batch tokens d"],
    starts: Sequence[int],
    ends: Sequence[int],
    seeds: Sequence[int],
) -> Float[Tensor, ""]:
    """Σ over rows and over tokens [start, end) of -log p(ŷ_t | the row's own tokens before t), ŷ_t ~ p.

    ŷ_t replaces the token that is there in the loss only, not in what later tokens see: the Fisher of the conditional
    distribution along the row. Row i draws with seeds[i], on the CPU: its labels are the same on every device, in every
    batch (but for draws that lie on an edge within rounding).
    """
    counts = loss_counts(starts, ends)
    draws = torch.cat([_uniform(seed, n) for seed, n in zip(seeds, counts, strict=True)]).to(last.device)

    def sample(logits: Float[Tensor, "n vocab"], chunk: slice) -> Int[Tensor, " n"]:
        cumulated = torch.softmax(logits, -1).cumsum(-1)
        # The last sum is 1 but for rounding; a draw above it would point past the vocabulary.
        found = torch.searchsorted(cumulated, (draws[chunk, None].to(logits.dtype) * cumulated[:, -1:]))
        return found[:, 0].clamp(max=logits.shape[-1] - 1)

    return summed_cross_entropy(model, last, starts, ends, sample)


def _uniform(seed: int, n: int) -> Float[Tensor, " n"]:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
