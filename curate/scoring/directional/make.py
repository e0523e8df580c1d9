"""Backends by name."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from curate.curvature.test_vector import TestVector
from curate.errors import ConfigError, near
from curate.scoring.directional.base import Backend, Reduction
from curate.scoring.directional.contraction import Contraction
from curate.scoring.directional.cosine import Cosine
from curate.scoring.directional.difference import Difference
from curate.scoring.directional.dual_blocks import supported
from curate.scoring.directional.forward import Forward

# As many queries as tangents are cheaper for than a backward, where tangents are written by hand (bench/scoring.py).
_FEW = 1
BACKENDS: dict[str, type[Backend]] = {b.name: b for b in (Contraction, Forward, Difference)}
"""Ways to one and the same number. `Cosine` gives another one, and is made by its name alone."""


def make_backend(
    name: str,
    model: PreTrainedModel,
    test_vector: TestVector | Sequence[TestVector],
    max_tokens: int = 8192,
    pad_id: int = 0,
    reduction: Reduction = "mean",
    per_token: bool = False,
    by_block: bool = False,
) -> Backend:
    """The backend `name` ("cosine" among them), or with "auto" the one that measures fastest for this model and number
    of queries.

    Raises:
        ConfigError: no such backend, or one that cannot give what is asked for. Others: see Backend.
    """
    if name == "auto":
        vectors = [test_vector] if isinstance(test_vector, TestVector) else test_vector
        few = sum(len(vector.names) for vector in vectors) <= _FEW and not by_block
        name = "forward" if few and supported(model) else "contraction"
    if name == Cosine.name:
        return Cosine(model, test_vector, max_tokens, pad_id, reduction, per_token, by_block)
    if name not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}{near(name, [*BACKENDS, 'auto'])}")
    return BACKENDS[name](model, test_vector, max_tokens, pad_id, reduction, per_token, by_block)
