"""Partial sums of tensors by name, that can be stored, loaded and added: what workers send and a reduce adds up.

In: tensors. Out: their sums. Knows no layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from curate.errors import CurvatureError


class Sums:
    """Σ of tensors by key, and of counts. `counts` are whole numbers ("tokens", "examples")."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, counts: Mapping[str, int] | None = None) -> None:
        self.tensors: dict[str, Tensor] = dict(tensors or {})
        self.counts: dict[str, int] = dict(counts or {})

    def at(self, key: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """The sum `key`, to be added to in place; zeros on the device of `like`, in float32 or better, at first."""
        if key not in self.tensors:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.tensors[key] = torch.zeros(shape, dtype=dtype, device=like.device)
        return self.tensors[key]

    def count(self, key: str, n: int) -> None:
        self.counts[key] = self.counts.get(key, 0) + n

    def merge(self, other: Sums) -> Self:
        """Add `other`, in place."""
        for key, tensor in other.tensors.items():
            mine = self.tensors.get(key)
            if mine is None:
                self.tensors[key] = tensor.clone()
            elif mine.shape != tensor.shape:
                raise CurvatureError(
                    f"sums of {key!r} have the shapes {tuple(mine.shape)} and {tuple(tensor.shape)}: they are of two "
                    f"models and cannot be added"
                )
            else:
                mine += tensor.to(mine.device)
        for key, n in other.counts.items():
            self.count(key, n)
        return self

    def finite(self, keys: Iterable[str]) -> bool:
        """Whether these sums are finite, every entry of them; one synchronisation."""
        marks = [self.tensors[key].sum() for key in keys]
        return not marks or bool(torch.isfinite(torch.stack(marks)).all())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as CPU tensors, for safetensors."""
        counts = {f"count/{key}": torch.tensor(n, dtype=torch.int64) for key, n in self.counts.items()}
        return {key: tensor.cpu().contiguous() for key, tensor in self.tensors.items()} | counts

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """What `state_dict` gave, again; a subset of its tensors will do, with the counts."""
        tensors = {key: tensor for key, tensor in state.items() if not key.startswith("count/")}
        counts = {key.removeprefix("count/"): int(n) for key, n in state.items() if key.startswith("count/")}
        return cls(tensors, counts)
