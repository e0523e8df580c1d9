"""Backends by name."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from curate.concepts.sae import SAE
from curate.curvature.fisher import Reduction
from curate.curvature.test_vector import TestVector
from curate.errors import ConfigError, near
from curate.scoring.latent.base import LatentBackend, Sign
from curate.scoring.latent.difference import Difference
from curate.scoring.latent.double_backward import DoubleBackward
from curate.scoring.latent.reverse_over_forward import ReverseOverForward

BACKENDS: dict[str, type[LatentBackend]] = {b.name: b for b in (ReverseOverForward, DoubleBackward, Difference)}


def make_latent_backend(
    name: str,
    model: PreTrainedModel,
    sae: SAE,
    vector: TestVector | Sequence[TestVector],
    token_budget: int = 2048,
    pad_id: int = 0,
    reduction: Reduction = "mean",
    sign: Sign = "ours",
) -> LatentBackend:
    """The backend `name`; "auto" is an exact one.

    Raises:
        ConfigError: no such backend, or a model that it cannot differentiate. Others: see LatentBackend.
    """
    if name == "auto":
        name = ReverseOverForward.name
    if name not in BACKENDS:
        raise ConfigError(f"there is no latent backend {name!r}{near(name, [*BACKENDS, 'auto'])}")
    return BACKENDS[name](model, sae, vector, token_budget, pad_id, reduction, sign)
