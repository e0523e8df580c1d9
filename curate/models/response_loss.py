"""Response loss: cross-entropy of the response tokens, without ever holding [batch, tokens, vocabulary] logits.

In: last hidden states (after the final norm). Out: a scalar that autograd can go through. Knows no layer below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from curate.models.pooling import span_mask
from curate.models.tap import head_logits

# Logits at once: 64 MiB in float32, a few hundred tokens of a large vocabulary.
_LOGITS = 16 * 2**20


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ cross-entropy over positions. The gradient to the states is made in the forward, chunk by chunk: the logits of
    one chunk are gone before the next one's are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "positions d"], targets: Int[Tensor, " positions"], model: PreTrainedModel
    ) -> Float[Tensor, ""]:
        rows = max(1, _LOGITS // int(model.config.get_text_config().vocab_size))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for i in range(0, hidden.shape[0], rows):
            with torch.enable_grad():
                states = hidden[i : i + rows].detach().requires_grad_(True)
                loss = F.cross_entropy(head_logits(model, states).float(), targets[i : i + rows], reduction="sum")
                (gradient[i : i + rows],) = torch.autograd.grad(loss, states)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


def loss_counts(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Number of tokens that carry the loss, per row: response and end of turn; a row's first token is not predicted."""
    return [end - max(start, 1) for start, end in zip(starts, ends, strict=True)]


def summed_response_loss(
    model: PreTrainedModel,
    last: Float[Tensor, "batch tokens d"],
    input_ids: Int[Tensor, "batch tokens"],
    starts: Sequence[int],
    ends: Sequence[int],
) -> Float[Tensor, ""]:
    """Σ over rows and over tokens [start, end) of -log p(token | tokens before it); divide by `loss_counts` for L.

    A sum, not a mean, so that a long row's gradients keep their size in half precision: they are divided in float32.
    """
    first = [max(start, 1) for start in starts]
    predicted = span_mask(first, ends, input_ids.shape[1], last.device)
    before = torch.zeros_like(predicted)
    before[:, :-1] = predicted[:, 1:]
    return _SummedCrossEntropy.apply(last[before], input_ids[predicted], model)
