"""Tangents of the last hidden state of any decoder, by PyTorch's forward-mode differentiation.

In: token ids, directions of some weights. Out: last hidden states and their tangents. One pass a query; the fused
attention kernels have no forward mode, so attention is the written-out one. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.autograd.forward_ad as fwd
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from curate.models.flops import ForwardCost
from curate.models.tap import decoder_parts
from curate.scoring.directional.tangents import Direction


class GenericTangents:
    def __init__(self, model: PreTrainedModel, directions: Mapping[str, Direction]) -> None:
        self.base = model.base_model
        inner = {id(module): name for name, module in self.base.named_modules()}
        self._weights = {}
        for name, s in directions.items():
            module = model.get_submodule(name)
            self._weights[f"{inner[id(module)]}.weight"] = (module.weight, s, isinstance(module, Conv1D))
        blocks = list(decoder_parts(model).blocks)
        moved = {id(model.get_submodule(name)) for name in directions}
        self._lowest = min(i for i, b in enumerate(blocks) if any(id(m) in moved for m in b.modules()))
        self._queries = next(iter(directions.values()))[0].shape[0]

    def flops(self, cost: ForwardCost, lengths: Sequence[int], positions: int) -> float:
        """Of one call without padding, for last states at so many `positions`; what they depend on is computed at all.

        From the lowest moved block up a tangent has W ẋ at each layer, and two products for each one of attention,
        which is bilinear.
        """
        tokens, pairs = sum(lengths), sum(n * n for n in lengths)
        along = sum(s[0].shape[-2] * s[-1].shape[-1] for _, s, _ in self._weights.values()) * tokens
        above = (cost.blocks - self._lowest) * (cost.block * tokens + 2 * cost.attention * pairs)
        return self._queries * (cost.flops(lengths) + 2.0 * (above + along))

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], at: Bool[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "positions d"], Float[Tensor, "positions q d"]]:
        """Last hidden states, and their tangents, at the positions where `at` is true."""
        values, moved = None, []
        for q in range(self._queries):
            with fwd.dual_level(), sdpa_kernel(SDPBackend.MATH):
                weights = {}
                for name, (weight, s, transposed) in self._weights.items():
                    direction = s[0][q] if len(s) == 1 else s[0][q] @ s[1][q]
                    weights[name] = fwd.make_dual(weight, (direction.T if transposed else direction).contiguous())
                out = functional_call(self.base, weights, kwargs={"input_ids": input_ids, "use_cache": False})
                last = fwd.unpack_dual(out.last_hidden_state)
                values = last.primal[at]
                moved.append(torch.zeros_like(values) if last.tangent is None else last.tangent[at])
        assert values is not None
        return values, torch.stack(moved, dim=1)
