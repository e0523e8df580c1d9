"""The paper's first way, eq. 18: for every active latent of every token one forward-mode derivative of G = ∇_θ₂ L along
its basis vector, contracted with s. A reference: as many passes as there are active latents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, jvp

from tests.scoring.latent.setting import dense_latents, loss_of, weights_and_direction


def jvp_sweep(model, sae, row, vector, query: int, reduction: str = "mean") -> Tensor:
    """Influence in our sign, dense [end, latents]."""
    weights, s = weights_and_direction(model, vector, query)
    r = dense_latents(model, sae, row)
    gradient = grad(lambda w, r: loss_of(model, sae, row, r, w, reduction))
    out = torch.zeros_like(r)
    for t, j in r.nonzero().tolist():
        basis = torch.zeros_like(r)
        basis[t, j] = 1.0
        _, moved = jvp(lambda r: gradient(weights, r), (r,), (basis,))
        out[t, j] = -r[t, j] * sum((s[name] * part).sum() for name, part in moved.items())
    return out
