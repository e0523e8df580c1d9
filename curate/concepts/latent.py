"""A latent of an SAE as a Concept: its decoder row is the direction, at the SAE's layer (METHODS §4).

In: an SAE and the number of a latent. Out: a Concept. Knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from curate.concepts.concept import Concept
from curate.concepts.sae import SAE, digest
from curate.errors import ConceptError


def decoder_concept(sae: SAE, latent: int, n_layers: int, meta: Mapping[str, Any] | None = None) -> Concept:
    """The decoder row of `latent`, named "<SAE>-<latent>": vectors [L+1, d], NaN at every layer but the SAE's.

    Args:
        n_layers: L, the number of blocks of the model. meta: how it was found, as JSON values.

    Raises:
        ConceptError: no such latent, no such layer, or a decoder row of zeros.
    """
    if not 0 <= latent < sae.latents:
        raise ConceptError(f"the SAE {sae.name!r} has the latents 0 to {sae.latents - 1}; there is no latent {latent}")
    if sae.layer > n_layers:
        raise ConceptError(f"the SAE {sae.name!r} is of layer {sae.layer}; the model has the layers 0 to {n_layers}")
    vectors = np.full((n_layers + 1, sae.width), np.nan, dtype=np.float32)
    vectors[sae.layer] = sae.w_dec[latent].detach().float().cpu().numpy()
    facts = {"sae": sae.name, "sae_digest": digest(sae), "latent": latent, **(meta or {})}
    return Concept(f"{sae.name}-{latent}", vectors, sae.layer, dict(sae.model), "sae_latent", "response_mean", facts)
