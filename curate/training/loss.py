"""The training loss: summed cross-entropy of the labelled tokens, with logits at these tokens alone.

`sum_response_loss(model)` replaces a causal LM's forward for the length of a training. It stays a forward of the whole
model, so that the wrappers of distributed training (DDP, FSDP) and of adapters (PEFT) see nothing new.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from curate.models.response_loss import summed_states_loss
from curate.models.tap import head_logits
from curate.training.batches import NO_LOSS

_LOGITS = 16 * 2**20  # of a chunk; 64 MiB in float32


def _forward(
    model: PreTrainedModel, input_ids: Int[Tensor, "rows tokens"], labels: Int[Tensor, "rows tokens"], **unused: Any
) -> CausalLMOutputWithPast:
    """`loss`: Σ -log p(label | tokens before it) over all labels that are not NO_LOSS, in float32."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != NO_LOSS
    states, targets = hidden[:, :-1][wanted], labels[:, 1:][wanted]
    # A batch without labels makes gradients of zero all the same: other workers wait for them.
    trained = any(p.requires_grad for p in model.get_output_embeddings().parameters())
    total = (_with_head if trained else summed_states_loss)(model, states, targets)
    return CausalLMOutputWithPast(loss=cast(Any, total))


def _with_head(model: PreTrainedModel, states: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """The sum where the head itself is trained: chunks whose logits are made again in the backward pass."""
    rows = max(1, _LOGITS // int(model.config.get_text_config().vocab_size))

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        logits = head_logits(model, some)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")

    if len(states) <= rows:
        return part(states, targets)
    chunks = zip(states.split(rows), targets.split(rows), strict=True)
    return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum()


@contextmanager
def sum_response_loss(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `model(input_ids=…, labels=…).loss` is the summed loss of the labels, and nothing else comes
    out. `model` is the causal LM itself, within an adapter's wrapper if there is one."""
    model.forward = MethodType(_forward, model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
