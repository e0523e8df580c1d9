"""Floating-point operations as PyTorch counts them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SAME = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}


class Counter(TorchDispatchMode):
    """PyTorch's formulas for each operator, without FlopCounterMode's module hooks (they refuse a nested backward)."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = _SAME.get(func.overloadpacket, func.overloadpacket)
        if (formula := flop_registry.get(known)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
