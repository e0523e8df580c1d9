"""Products with adapters' matrices in vLLM on a CPU: one an adapter, where vLLM has one a token.

vLLM 0.32 copies an adapter's matrices for every token of a batch before it multiplies, which takes ten times as long as
the model itself, and takes those of the last slot for a token without adapter (index -1). Here a batch is multiplied by
each adapter in it once, and tokens without one get nothing. Numbers are those of vLLM: sums in the output's precision.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def products(
    inputs: Float[Tensor, "n i"], weights: Float[Tensor, "slots *one o i"], slots: Int[Tensor, " n"], dtype: torch.dtype
) -> Float[Tensor, "n o"]:
    """Row n of `inputs` times the matrix of slot `slots[n]`, in `dtype`; zeros where the slot is -1."""
    matrices = weights.squeeze(1) if weights.ndim == 4 else weights
    rows = inputs.to(dtype)
    first, last = int(slots.min()), int(slots.max())
    if first == last >= 0:
        return rows @ matrices[first].to(dtype).T
    out = rows.new_zeros(len(rows), matrices.shape[1])
    for slot in range(max(first, 0), last + 1):
        at = slots == slot
        out[at] = rows[at] @ matrices[slot].to(dtype).T
    return out


def _shrink(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, scaling: float = 1.0) -> None:
    made = products(inputs, weights, slots, output.dtype)
    output[:, : made.shape[1]] = scaling * made


def _expand(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, add_inputs: bool = True) -> None:
    made = products(inputs, weights, slots, output.dtype)
    wide = min(made.shape[1], output.shape[1])  # either may be padded
    _put(made[: len(output), :wide], output[:, :wide], add_inputs)


def _expand_slice(
    inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, offset: int, size: int, add_inputs: bool = True
) -> None:
    _put(products(inputs, weights, slots, output.dtype), output[:, offset : offset + size], add_inputs)


def _put(made: Tensor, place: Tensor, add: bool) -> None:
    if add:
        place += made
    else:
        place[:] = made


def install() -> None:
    """Put these in the place of vLLM's own, in this process."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    ours: dict[str, Any] = {"bgmv_shrink": _shrink, "bgmv_expand": _expand, "bgmv_expand_slice": _expand_slice}
    for module in (lora_ops, punica_cpu):  # the wrapper has names of its own for them
        for name, function in ours.items():
            setattr(module, name, function)
