"""FLOPs of a pass, from a model's config alone: for plans, and for the throughput in a run's statistics.

In: a Hugging Face config or model (no weights are read), token counts. Out: FLOPs, one multiply-add = 2.
Counts the matrix products of the blocks and the head, and attention as the kernels compute it (tokens × tokens, no
saving for the causal half); norms, activations and positions are left out (about 1 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from curate.models.tap import decoder_parts


@dataclass(frozen=True)
class ForwardCost:
    """Multiply-adds of one forward pass: `block` and `head` for each token, `attention` for each pair of tokens."""

    blocks: int
    block: float
    attention: float
    head: float

    def flops(self, lengths: Sequence[int], layers: int | None = None, head_tokens: int = 0) -> float:
        """FLOPs to bring rows of `lengths` tokens to `hidden_states[layers]` (None: the last), and `head_tokens` of
        them through the head."""
        depth = self.blocks if layers is None else min(layers, self.blocks)
        tokens, pairs = float(sum(lengths)), float(sum(n * n for n in lengths))
        return 2.0 * (depth * (self.block * tokens + self.attention * pairs) + self.head * head_tokens)

    def gradient_flops(self, lengths: Sequence[int], lowest: int, loss_tokens: int) -> float:
        """FLOPs of the backward to the activations of layer `lowest` (no weight gradient): each product once again,
        the two of attention twice."""
        depth = max(self.blocks - lowest, 0)
        tokens, pairs = float(sum(lengths)), float(sum(n * n for n in lengths))
        return 2.0 * (depth * (self.block * tokens + 2 * self.attention * pairs) + self.head * loss_tokens)


def forward_cost(config: PretrainedConfig) -> ForwardCost:
    """Costs for any decoder that transformers can build from `config`; no weights are made."""
    with torch.device("meta"):
        return model_cost(AutoModelForCausalLM.from_config(config))


def model_cost(model: PreTrainedModel) -> ForwardCost:
    """Costs of a model that is already there; experts count by how many of them a token visits."""
    parts = decoder_parts(model)
    settings = model.config.get_text_config()
    experts = getattr(settings, "num_local_experts", None) or getattr(settings, "num_experts", None) or 1
    visited = getattr(settings, "num_experts_per_tok", None) or 1
    total = 0.0
    for name, weight in parts.blocks.named_parameters():
        if weight.ndim >= 2:
            total += weight.numel() * (visited / experts if ".experts." in name else 1.0)
    heads = settings.num_attention_heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    head = next(w.numel() for w in parts.head.parameters() if w.ndim == 2)
    count = len(parts.blocks)
    return ForwardCost(blocks=count, block=total / count, attention=2.0 * heads * head_dim, head=float(head))


def forward_flops(
    config: PretrainedConfig, lengths: Sequence[int], layers: int | None = None, head_tokens: int = 0
) -> float:
    """FLOPs of a forward over rows of `lengths` tokens that stops at `layers`; see ForwardCost.flops."""
    return forward_cost(config).flops(lengths, layers, head_tokens)
