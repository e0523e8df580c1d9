"""Blocks of the Llama family with tangents: pre-norm, rotary grouped attention, gated SiLU.

In: token ids, directions of some weights. Out: last hidden states and their tangents at chosen positions. Below the
lowest moved block the model runs as it is. What is done token by token goes in chunks that caches can hold, and in the
last block only for the positions that are asked for. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from curate.models.flops import ForwardCost
from curate.models.tap import LayerTap, decoder_parts
from curate.scoring.directional.tangents import (
    Direction,
    Stack,
    add,
    causal_attention,
    linear,
    rms_norm,
    rotate,
    silu_gate,
    widened,
)

_BLOCKS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer")
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# Rows of a matrix product in the token-wise parts: a few MiB of intermediate values.
_ROWS_CPU, _ROWS_GPU = 512, 2**16


def supported(model: PreTrainedModel) -> bool:
    """True if every block is one that this module writes out, with plain linear layers and SiLU."""
    parts = decoder_parts(model)
    blocks: list[Any] = list(parts.blocks)
    return (
        hasattr(model.base_model, "rotary_emb")
        and parts.final_norm is not None
        and all(
            type(block).__name__ in _BLOCKS
            and isinstance(block.mlp.act_fn, (nn.SiLU, SiLUActivation))
            and all(type(getattr(block.self_attn, name)) is nn.Linear for name in _ATTENTION)
            and all(type(getattr(block.mlp, name)) is nn.Linear for name in _MLP)
            for block in blocks
        )
    )


class DualBlocks:
    """
    Args:
        model: one that is `supported`.
        directions: {layer name: block of s}, in the precision and on the device of the layer's weight.
    """

    def __init__(self, model: PreTrainedModel, directions: Mapping[str, Direction]) -> None:
        self.model, self.directions = model, directions
        parts = decoder_parts(model)
        self.blocks: list[Any] = list(parts.blocks)
        self.norm: Any = parts.final_norm
        self.names = {id(module): name for name, module in model.named_modules()}
        moved = {id(model.get_submodule(name)) for name in directions}
        self.lowest = min(i for i, b in enumerate(self.blocks) if any(id(m) in moved for m in b.modules()))
        self.queries = next(iter(directions.values()))[0].shape[0]
        self._tap = LayerTap(model, [self.lowest])
        self._rows = _ROWS_CPU if model.device.type == "cpu" else _ROWS_GPU

    def flops(self, cost: ForwardCost, lengths: Sequence[int], positions: int) -> float:
        """Of one call without padding, for last states at so many `positions`."""
        tokens, pairs = sum(lengths), sum(n * n for n in lengths)
        products, moves = 0.0, False

        def through(module: nn.Linear, n: int, moving: bool) -> bool:
            nonlocal products
            s = self.directions.get(self.names[id(module)], ())
            products += n * (module.weight.numel() * (1 + self.queries * moving) + sum(part.numel() for part in s))
            return moving or bool(s)

        for i in range(self.lowest, len(self.blocks)):
            layer, mlp = self.blocks[i].self_attn, self.blocks[i].mlp
            n = positions if i == len(self.blocks) - 1 else tokens
            mixed = any([through(getattr(layer, name), tokens, moves) for name in _ATTENTION[:3]])
            products += (1 + 2 * self.queries * mixed) * cost.attention * pairs
            moves = through(layer.o_proj, n, mixed) or moves
            gated = any([through(module, n, moves) for module in (mlp.gate_proj, mlp.up_proj)])
            moves = through(mlp.down_proj, n, gated) or moves
        return cost.flops(lengths, self.lowest) + 2.0 * products

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], at: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "positions d"], Float[Tensor, "positions q d"]]:
        """Last hidden states, and their tangents, at the positions where `at` is true, row by row."""
        batch, tokens = input_ids.shape
        hidden = self._tap(input_ids)[self.lowest]
        where = torch.arange(tokens, device=hidden.device)[None]
        decoder: Any = self.model.base_model
        cos, sin = decoder.rotary_emb(hidden, where)
        x: Stack = hidden.reshape(batch * tokens, 1, -1)
        chosen = at.reshape(-1).nonzero()[:, 0]
        for i in range(self.lowest, len(self.blocks)):
            last = i == len(self.blocks) - 1
            mixed = self._attention(self.blocks[i], x, (batch, tokens), cos, sin)
            if last:
                x, mixed = x[chosen], mixed[chosen]
            x = self._tokenwise(self.blocks[i], x, mixed)
        x = rms_norm(widened(x, 1 + self.queries), self.norm.weight, self.norm.variance_epsilon)
        return x[:, 0], x[:, 1:]

    def _attention(self, block: Any, x: Stack, shape: tuple[int, int], cos: Tensor, sin: Tensor) -> Stack:
        """Norm, q, k and v, rotary positions, and the heads' mixed values before the output projection."""
        layer = block.self_attn
        norm = block.input_layernorm
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for chunk in self._chunks(x):
            read = rms_norm(chunk, norm.weight, norm.variance_epsilon)
            for found, name in zip(parts, _ATTENTION, strict=False):
                found.append(self._linear(read, getattr(layer, name)))
        p = max(found[0].shape[1] for found in parts)
        q, k, v = (
            widened(torch.cat(found) if len(found) > 1 else found[0], p).unflatten(-1, (-1, layer.head_dim))
            for found in parts
        )
        if hasattr(layer, "q_norm"):
            q = rms_norm(q, layer.q_norm.weight, layer.q_norm.variance_epsilon)
            k = rms_norm(k, layer.k_norm.weight, layer.k_norm.variance_epsilon)
        q, k, v = (part.unflatten(0, shape) for part in (q, k, v))
        mixed = causal_attention(
            rotate(q, cos, sin, layer.scaling), rotate(k, cos, sin), v.permute(2, 0, 3, 1, 4), _window(layer)
        )
        return mixed.flatten(0, 1)

    def _tokenwise(self, block: Any, x: Stack, mixed: Stack) -> Stack:
        """What follows the attention: its output projection, the residual stream, the MLP."""
        norm, mlp = block.post_attention_layernorm, block.mlp
        out = []
        for stream, heads in zip(self._chunks(x), self._chunks(mixed), strict=True):
            stream = add(stream, self._linear(heads, block.self_attn.o_proj))
            read = rms_norm(stream, norm.weight, norm.variance_epsilon)
            gated = silu_gate(self._linear(read, mlp.gate_proj), self._linear(read, mlp.up_proj))
            out.append(add(stream, self._linear(gated, mlp.down_proj)))
        p = max(part.shape[1] for part in out)
        return out[0] if len(out) == 1 else torch.cat([widened(part, p) for part in out])

    def _linear(self, x: Stack, module: nn.Linear) -> Stack:
        return linear(x, module.weight, module.bias, self.directions.get(self.names[id(module)]))

    def _chunks(self, x: Stack) -> tuple[Stack, ...]:
        return x.split(max(1, self._rows // (1 + self.queries)))


def _window(layer: Any) -> int | None:
    """How many tokens back this layer sees, itself counted; None: all."""
    if hasattr(layer, "sliding_window"):  # Qwen2, Qwen3: a layer's own
        return layer.sliding_window
    return getattr(layer.config, "sliding_window", None) if "Mistral" in type(layer).__name__ else None
