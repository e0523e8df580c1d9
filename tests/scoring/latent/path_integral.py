"""The exact decomposition, eq. 12-14: what each latent adds to ⟨s, G(r)⟩ on the way from no latent to all of them.

Contribution of a latent: r_j ∫₀¹ ⟨s, J_G(αr) e_j⟩ dα, by Gauss-Legendre quadrature of `nodes` points. They sum to
⟨s, G(r) − G(0)⟩; the influence that the backends give is the integrand at α = 1 (eq. 15 with r⋆ = r).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.scoring.latent.setting import dense_latents, slope_of_projection


def contributions(model, sae, row, vector, query: int, nodes: int = 96) -> Tensor:
    """[end, latents], of ⟨s, G⟩ itself (no sign)."""
    r = dense_latents(model, sae, row)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    total = torch.zeros_like(r)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        total += weight * slope_of_projection(model, sae, row, point * r, vector, query)
    return r * total
