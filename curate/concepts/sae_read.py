"""What a file of any project says about an SAE, before it is ours: weights, form, and where it was hooked in.

In: a project's own name of a place in a model. Out: our number of the layer. Knows no file.

TransformerLens names: `blocks.N.hook_resid_pre` is the input of block N, hidden_states[N]; `…hook_resid_post` is its
output, hidden_states[N+1]. Module names (`layers.N`, `transformer.h.N`): the block's output, hidden_states[N+1]. The
output of the last block comes before the final norm and is no hidden state of Hugging Face's: a name does not say how
many blocks there are, so it is marked and `sae.check_fits` looks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curate.concepts.sae import Activation, Normalise
from curate.errors import ConceptError

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)[._](\d+)")


@dataclass(frozen=True)
class Hook:
    """`layer` as in `hidden_states`; `after_block`: the place is a block's output (see above)."""

    name: str
    layer: int
    after_block: bool


@dataclass(frozen=True, eq=False)
class Read:
    """An SAE as a file has it. `hook` None: the file names no place in the residual stream between blocks.

    `place`: what it says instead. `unscaled`: it was trained on scaled states and does not say by how much.
    """

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_pre: Tensor
    b_dec: Tensor
    activation: Activation
    k: int | None = None
    threshold: Tensor | None = None
    normalise: Normalise = "none"
    unscaled: bool = False
    hook: Hook | None = None
    place: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def hook_of(name: str | None) -> Hook | None:
    """Where a hook's name points; None if it is no place in the residual stream between two blocks."""
    if name is None:
        return None
    if m := _RESIDUAL.fullmatch(name):
        after = m[2] == "post"
        return Hook(name, int(m[1]) + after, after)
    if m := _MODULE.fullmatch(name):
        return Hook(name, int(m[1]) + 1, True)
    return None


class Weights:
    """A file's tensors by name, each taken once, as float32 (or float64, where it has that).

    Raises:
        ConceptError: a tensor is not there, not of numbers, or of another shape; names it.
    """

    def __init__(self, tensors: Mapping[str, Any], url: str) -> None:
        self.tensors, self.url = tensors, url

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ConceptError(f"{self.url} has no tensor {name!r}; it has {sorted(self.tensors)[:12]}")
        tensor = self.tensors[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConceptError(f"{self.url}: {name} is {kind}, not a tensor of floating-point numbers")
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()

    def matrix(self, name: str, transpose: bool = False) -> Tensor:
        """Two-dimensional; its transpose, if so."""
        found = self[name]
        if found.ndim != 2:
            raise ConceptError(f"{self.url}: {name} has the shape {list(found.shape)}, expected a matrix")
        return found.T.contiguous() if transpose else found


def unit_decoder(w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same function with decoder rows of length 1: activations are multiplied by the rows' lengths."""
    norm = torch.linalg.vector_norm(w_dec, dim=1).clamp(min=1e-8)
    return w_enc * norm[:, None], b_enc * norm, w_dec / norm[:, None]


def whole_number(value: Any, what: str, url: str) -> int:
    """Raise ConceptError unless `value` is a whole number (3, 3.0, a tensor of one)."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ConceptError(f"{url}: {what} is {value!r}, expected a whole number")
    return int(value)
