"""Reverse over forward: the derivative of the last states along s, carried beside them, and both differentiated back.

Exact (METHODS §5). Forward mode gives h and ḣ_q = d/dε h(θ₂ + ε s_q); P_q = ⟨g, ḣ_q⟩ with g = ∂ℓ/∂h, so ∇_x̃ P_q pulls
ġ_q = (∂²ℓ/∂h²) ḣ_q back through h, and g through ḣ_q. One forward of values and one backward of g serve all queries;
each query adds a tangent to the one and to the other. No gradient by a weight is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from curate.models.tap import head_logits
from curate.scoring.directional.base import sum_dtype
from curate.scoring.latent.base import LatentBackend, LatentBatch, Weights

# Tangents carried at once; more of them are carried in another pass.
_QUERIES = 8
# Logits and their tangents at once: 64 MiB in float32.
_LOGITS = 16 * 2**20


class ReverseOverForward(LatentBackend):
    name = "reverse_over_forward"

    def _slopes(self, batch: LatentBatch, queries: Sequence[int]) -> Float[Tensor, "q batch tokens d"]:
        groups = [queries[i : i + _QUERIES] for i in range(0, len(queries), _QUERIES)]
        return torch.cat([self._group(batch, group) for group in groups])

    def _tokens_at_once(self, queries: int) -> int:
        # The graph of values and tangents is as large as that of one query at most.
        return max(1, 2 * self.token_budget // (1 + min(max(queries, 1), _QUERIES)))

    def _group(self, batch: LatentBatch, queries: Sequence[int]) -> Float[Tensor, "q batch tokens d"]:
        def along(s: Weights) -> Tensor:
            def dual(x: Tensor) -> Any:
                def states(weights: Weights) -> Tensor:
                    return functional_call(self._down, weights, (x, batch.where), tie_weights=False)

                return jvp(states, (self._weights,), (s,))

            both: Any = vjp(dual, batch.x)
            (h, moved), pull = both
            g, change = slopes(self.model, h, moved, batch.targets, 1 + len(queries))
            (gradient,) = pull((change, g))
            return gradient

        # The fused attention kernels have no forward mode.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _WrittenOut():
            return vmap(along)(self._direction(queries))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As F.layer_norm, argument names and all."""
    axes = tuple(range(-len(normalized_shape), 0))
    wide = input.to(sum_dtype(input.dtype))
    centred = wide - wide.mean(axes, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(input.dtype)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """As F.rms_norm, argument names and all."""
    axes = tuple(range(-len(normalized_shape), 0))
    wide = input.to(sum_dtype(input.dtype))
    small = torch.finfo(input.dtype).eps if eps is None else eps
    out = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + small)
    return (out if weight is None else out * weight).to(input.dtype)


class _WrittenOut(TorchFunctionMode):
    """Norms in plain operations. PyTorch's own layer norm has a tangent that takes the mean and the spread for
    constants when it is differentiated back: the result would be wrong, without an error. A fused RMS norm has none."""

    _ours: Mapping[Any, Callable[..., Tensor]] = {F.layer_norm: layer_norm, F.rms_norm: rms_norm}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._ours.get(func, func)(*args, **(kwargs or {}))


def slopes(
    model: PreTrainedModel,
    h: Float[Tensor, "n d"],
    moved: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    copies: int,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """g = ∂ℓ/∂h of the summed cross-entropy, and ġ = (∂²ℓ/∂h²) ḣ for ḣ = `moved`, a chunk of positions at a time.

    `copies`: how many [positions, vocabulary] this makes at once where it runs for several ḣ together.
    """
    rows = max(1, _LOGITS // (copies * int(model.config.get_text_config().vocab_size)))
    parts = []
    for i in range(0, h.shape[0], rows):

        def loss(states: Tensor, part: slice = slice(i, i + rows)) -> Tensor:
            logits = head_logits(model, states)
            return F.cross_entropy(logits.to(sum_dtype(logits.dtype)), targets[part], reduction="sum")

        parts.append(jvp(grad(loss), (h[i : i + rows],), (moved[i : i + rows],)))
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)
