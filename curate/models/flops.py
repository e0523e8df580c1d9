"""FLOPs of a pass, from a model's config alone: for plans, and for the throughput in a run's statistics.

In: a Hugging Face config or model (no weights are read), token counts. Out: FLOPs, one multiply-add = 2.
Counts the matrix products of the blocks and the head, and attention as the kernels compute it (tokens × tokens, no
saving for the causal half); norms, activations and positions are left out (about 1 %).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from curate.models.load import ModelSpec, resolve
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

    def generation_flops(self, prompts: Sequence[int], generated: Sequence[int]) -> float:
        """FLOPs to read prompts of so many tokens and to generate so many after each, one at a time with a cache: each
        attends to all before it, the last one is not read, and each comes from the head."""
        steps = sum(max(g - 1, 0) for g in generated)
        pairs = sum(p * max(g - 1, 0) + g * (g - 1) / 2 for p, g in zip(prompts, generated, strict=True))
        read = self.flops(prompts, None, sum(map(bool, generated)))
        return read + 2.0 * (self.blocks * (self.block * steps + self.attention * pairs) + self.head * steps)


def forward_cost(config: PretrainedConfig) -> ForwardCost:
    """Costs for any decoder that transformers can build from `config`; no weights are made."""
    with torch.device("meta"):
        return model_cost(AutoModelForCausalLM.from_config(config))


def cost_of(spec: ModelSpec) -> ForwardCost:
    """Costs of the model that `spec` names, from its config."""
    return forward_cost(AutoConfig.from_pretrained(resolve(spec), trust_remote_code=False))


def model_cost(model: PreTrainedModel) -> ForwardCost:
    """Costs of a model that is already there, with its adapter if it has one."""
    parts = decoder_parts(model)
    settings = model.config.get_text_config()
    heads = settings.num_attention_heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    head = next(w.numel() for w in parts.head.parameters() if w.ndim == 2)
    count = len(parts.blocks)
    block = sum(n for n, _ in _products(model)) / count
    return ForwardCost(blocks=count, block=block, attention=2.0 * heads * head_dim, head=float(head))


def weight_gradient_products(model: PreTrainedModel) -> tuple[float, float]:
    """Multiply-adds to the gradients of what is trained (requires_grad): of the blocks' matrices for each token, of the
    head for each token of the loss."""
    head = next(w for w in decoder_parts(model).head.parameters() if w.ndim == 2)
    blocks = sum(n for n, trained in _products(model) if trained)
    return blocks, float(head.numel()) if head.requires_grad else 0.0


def _products(model: PreTrainedModel) -> Iterator[tuple[float, bool]]:
    """(multiply-adds a token, trained?) of each matrix of the blocks; experts count by how many a token visits."""
    settings = model.config.get_text_config()
    experts = getattr(settings, "num_local_experts", None) or getattr(settings, "num_experts", None) or 1
    visited = getattr(settings, "num_experts_per_tok", None) or 1
    for name, weight in decoder_parts(model).blocks.named_parameters():
        if weight.ndim >= 2:
            yield weight.numel() * (visited / experts if ".experts." in name else 1.0), weight.requires_grad


def forward_flops(
    config: PretrainedConfig, lengths: Sequence[int], layers: int | None = None, head_tokens: int = 0
) -> float:
    """FLOPs of a forward over rows of `lengths` tokens that stops at `layers`; see ForwardCost.flops."""
    return forward_cost(config).flops(lengths, layers, head_tokens)
