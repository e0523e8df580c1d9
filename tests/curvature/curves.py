"""Dense curvature of a tiny model's mean response loss in float64, from its logits: the Hessian by autograd twice,
the Gauss–Newton matrix from the logits' Jacobian. And the tiny models, rows and vectors that they are made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacfwd, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from curate.concepts.sae import SAE
from curate.corpus.render import Rendered
from curate.models.splice import spliced
from curate.models.tracked import LayerChoice
from tests.curvature.oracle import count, make_rows
from tests.tiny import tiny_model

ROWS = make_rows(4, vocab=40, longest=8)
FEW = LayerChoice("all", first=1, pattern=r"(v_proj|down_proj|attn\.c_proj|dense_4h)")


def small(kind: str, layers: int = 3, **more):
    return tiny_model(kind, layers=layers, d=8, vocab=40, **more).double()


def vectors(layers, q: int, seed: int = 0) -> dict[str, torch.Tensor]:
    maker = torch.Generator().manual_seed(seed)
    return {x.name: torch.randn((q, x.out, x.width), generator=maker, dtype=torch.float64) for x in layers}


def random_sae(layer: int, d: int = 8, h: int = 24, k: int = 5) -> SAE:
    maker = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=maker, dtype=torch.float64)

    return SAE(draw(h, d), draw(h), draw(h, d), draw(d), draw(d), "topk", layer, "random", k=k)


class Dense:
    """H [n, n] over the flattened weights of `layers` (each as [out, in]), layer after layer."""

    def __init__(self, model, layers, rows: Sequence[Rendered], reduction: str = "mean", sae=None) -> None:
        self.model, self.layers, self.rows, self.reduction, self.sae = model, layers, rows, reduction, sae
        self.modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
        self.theta = self.flat({n: self._turn(n, m.weight.detach())[None] for n, m in self.modules.items()})[0]

    def _turn(self, name: str, w: Tensor) -> Tensor:
        return w.mT if isinstance(self.modules[name], Conv1D) else w

    def flat(self, vectors) -> Tensor:
        """[q, n] of {layer: [q, out, in]}."""
        return torch.cat([vectors[layer.name].flatten(1) for layer in self.layers], dim=1)

    def unflat(self, v: Tensor) -> dict[str, Tensor]:
        parts = v.split([layer.size for layer in self.layers], dim=-1)
        return {x.name: p.reshape(-1, x.out, x.width) for x, p in zip(self.layers, parts, strict=True)}

    def logits(self, theta: Tensor, row: Rendered) -> Tensor:
        own = {f"{n}.weight": self._turn(n, w[0]) for n, w in self.unflat(theta).items()}
        here = nullcontext() if self.sae is None else spliced(self.model, self.sae)
        with sdpa_kernel(SDPBackend.MATH), here:
            out = functional_call(self.model, own, kwargs={"input_ids": torch.tensor([row.input_ids])}).logits[0]
        return out[max(row.start, 1) - 1 : row.end - 1]

    def _mean(self, term: Callable[[Rendered], Tensor]) -> Tensor:
        parts = [term(row) / (count(row) if self.reduction == "mean" else 1) for row in self.rows]
        return sum(parts) / len(parts)

    def loss(self, theta: Tensor) -> Tensor:
        return self._mean(
            lambda row: F.cross_entropy(
                self.logits(theta, row), torch.tensor(row.input_ids[max(row.start, 1) : row.end]), reduction="sum"
            )
        )

    def hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, self.theta, vectorize=True)

    def _jacobian(self, row: Rendered) -> Tensor:
        """∂ logits/∂θ [t, v, n]."""

        def f(theta: Tensor) -> Tensor:
            return self.logits(theta, row)

        if self.sae is None:
            return jacfwd(f)(self.theta)
        if self.logits(self.theta, row).numel() < 1000:
            return torch.autograd.functional.jacobian(f, self.theta, vectorize=True)
        unit = torch.eye(len(self.theta), dtype=torch.float64)  # the SAE has no rule for all columns at once
        return torch.stack([jvp(f, (self.theta,), (e,))[1] for e in unit], dim=-1)

    def gauss_newton(self) -> Tensor:
        def term(row: Rendered) -> Tensor:
            j = self._jacobian(row)
            p = torch.softmax(self.logits(self.theta, row), -1)[..., None]
            centred = p * (j - (p * j).sum(1, keepdim=True))  # (diag(p) - ppᵀ) J
            return torch.einsum("tvn,tvm->nm", j, centred)

        return self._mean(term)
