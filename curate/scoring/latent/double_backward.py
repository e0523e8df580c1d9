"""Double backward: the paper's way (eq. 20, 36; appendix D.2), over the tracked weights alone.

∇_θ₂ of the batch's loss with a graph of its own, P_q = ⟨s_q, ∇_θ₂⟩, and a backward of P_q to x̃. The loss is summed over
the batch's rows, so one gradient by the weights serves all of them: a row's x̃ reaches its own loss alone. The first
backward serves all queries. Keeps the graph of a forward and a backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from curate.curvature.output_hessian import weighted_loss
from curate.scoring.latent.base import LatentBackend, LatentBatch


class DoubleBackward(LatentBackend):
    name = "double_backward"

    def _slopes(self, batch: LatentBatch, queries: Sequence[int]) -> Float[Tensor, "q batch tokens d"]:
        found: list[Tensor] = []
        # The fused attention kernels have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x = batch.x.detach().requires_grad_(True)
            weights = {name: weight.detach().requires_grad_(True) for name, weight in self._weights.items()}
            h = functional_call(self._down, weights, (x, batch.where), tie_weights=False)
            loss = weighted_loss(self.model, h, batch.targets, torch.ones_like(h[:, 0]))
            gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            for number, q in enumerate(queries):
                s = self._direction([q])
                products = [(part * s[name][0]).sum() for name, part in zip(weights, gradient, strict=True)]
                more = number + 1 < len(queries)
                found += torch.autograd.grad(torch.stack(products).sum(), x, retain_graph=more)
        return torch.stack(found)

    def _flops_above(self, once: float, lengths: Sequence[int], queries: int) -> float:
        """The first backward makes the weights' gradients besides."""
        return super()._flops_above(once, lengths, queries) + 2.0 * self._tracked * sum(lengths)
