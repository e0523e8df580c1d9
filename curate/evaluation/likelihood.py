"""Likelihood of given responses: how probable a model finds each, token by token, summed.

In: a model and rendered conversations. Out: a Likelihood each: Σ log p(token | tokens before it) over the tokens
[start, end) of the response, end of turn included. Logits are made at those positions only, and a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.evaluation.base import Likelihood
from curate.models.batching import collate, token_batches
from curate.models.pooling import span_mask
from curate.models.response_loss import loss_counts, predicting_mask
from curate.models.tap import head_logits

# Logits at once: 64 MiB in float32.
_LOGITS = 16 * 2**20


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel, rendered: Sequence[Rendered], token_budget: int, pad_id: int
) -> list[Likelihood]:
    """One Likelihood for each conversation, in order. A row's first token is predicted by nothing and not counted.

    Args:
        token_budget: padded tokens of a batch.
    """
    out: list[Likelihood | None] = [None] * len(rendered)
    for rows in token_batches([len(r.input_ids) for r in rendered], token_budget):
        batch = [rendered[i] for i in rows]
        starts, ends = [max(r.start, 1) for r in batch], [r.end for r in batch]
        ids, _ = collate([r.input_ids for r in batch], pad_id, device=model.device)
        # No mask: padding is on the right, and attention is causal.
        last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        at = predicting_mask(starts, ends, ids.shape[1], ids.device)
        found = _log_probabilities(model, last[at], ids[span_mask(starts, ends, ids.shape[1], ids.device)])
        counts = loss_counts(starts, ends)
        for i, nats, tokens in zip(rows, found.split(counts), counts, strict=True):
            out[i] = Likelihood(float(nats.sum()), tokens)
    return [x for x in out if x is not None]


def _log_probabilities(
    model: PreTrainedModel, states: Float[Tensor, "n d"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log p(target) at each state, in float64 on the CPU: thousands of them are summed."""
    rows = max(1, _LOGITS // int(model.config.get_text_config().vocab_size))
    found = []
    for i in range(0, len(states), rows):
        logits = head_logits(model, states[i : i + rows]).float()
        found.append(-F.cross_entropy(logits, targets[i : i + rows], reduction="none"))
    return torch.cat(found).double().cpu()
