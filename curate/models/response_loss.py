"""Response loss: cross-entropy of the response tokens, without ever holding [batch, tokens, vocabulary] logits.

In: last hidden states (after the final norm). Out: a scalar that autograd can go through. Knows no layer below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from curate.models.pooling import span_mask
from curate.models.tap import head_logits

# Logits at once: 64 MiB in float32, a few hundred tokens of a large vocabulary.
_LOGITS = 16 * 2**20

# The targets of the positions [slice], given their logits.
Targets = Callable[[Float[Tensor, "n vocab"], slice], Int[Tensor, " n"]]


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ cross-entropy over positions. The gradient to the states is made in the forward, chunk by chunk: the logits of
    one chunk are gone before the next one's are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "positions d"], targets: Targets, model: PreTrainedModel
    ) -> Float[Tensor, ""]:
        rows = max(1, _LOGITS // int(model.config.get_text_config().vocab_size))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for i in range(0, hidden.shape[0], rows):
            chunk = slice(i, i + rows)
            with torch.enable_grad():
                states = hidden[chunk].detach().requires_grad_(True)
                logits = head_logits(model, states).to(dtype)
                loss = F.cross_entropy(logits, targets(logits.detach(), chunk), reduction="sum")
                (gradient[chunk],) = torch.autograd.grad(loss, states)
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
    targets = input_ids[span_mask([max(start, 1) for start in starts], ends, input_ids.shape[1], last.device)]
    return summed_cross_entropy(model, last, starts, ends, lambda logits, chunk: targets[chunk])


def summed_cross_entropy(
    model: PreTrainedModel,
    last: Float[Tensor, "batch tokens d"],
    starts: Sequence[int],
    ends: Sequence[int],
    targets: Targets,
) -> Float[Tensor, ""]:
    """As `summed_response_loss`, against `targets` of the caller's choice, row by row in the order of the tokens."""
    predicting = predicting_mask(starts, ends, last.shape[1], last.device)
    return _SummedCrossEntropy.apply(last[predicting], targets, model)


def summed_states_loss(
    model: PreTrainedModel, states: Float[Tensor, "n d"], targets: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Σ -log p(target | state) over states after the final norm; no gradient reaches the head."""
    return _SummedCrossEntropy.apply(states, lambda logits, chunk: targets[chunk], model)


def predicting_mask(
    starts: Sequence[int], ends: Sequence[int], tokens: int, device: torch.device | str
) -> Bool[Tensor, "batch {tokens}"]:
    """True at the positions whose states predict the tokens [start, end): each one before a token with a loss."""
    first = [max(start, 1) - 1 for start in starts]
    return span_mask(first, [end - 1 for end in ends], tokens, device)
