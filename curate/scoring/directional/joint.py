"""One pass for the test vectors of all methods: their queries side by side, split again into each method's columns.

In: scorers with test vectors, a model, rows. Out: {method: [n, q]}. Scorers that want another backend or another
reduction of the loss get a pass of their own. Knows no method's formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.curvature.test_vector import TestVector
from curate.errors import ConfigError
from curate.scoring.base import PassStats, Scorer
from curate.scoring.directional.base import Backend, Reduction
from curate.scoring.directional.make import make_backend


class Joint:
    """A backend whose queries are those of `vectors`, one after the other."""

    def __init__(self, backend: Backend, vectors: Mapping[str, TestVector]) -> None:
        self.backend = backend
        self._sizes = {method: len(vector.names) for method, vector in vectors.items()}

    def __call__(self, rows: Sequence[Rendered]) -> tuple[dict[str, Float[Tensor, "n q"]], PassStats]:
        found = self.backend.run(rows)
        parts = torch.from_numpy(found.scores).split(list(self._sizes.values()), dim=1)
        return dict(zip(self._sizes, parts, strict=True)), found.stats


def joint_passes(model: PreTrainedModel, scorers: Sequence[Scorer], max_tokens: int, pad_id: int) -> list[Joint]:
    """As few passes as the scorers' settings allow: one for each backend and reduction.

    Raises:
        ConfigError: a scorer was given a header in the place of its test vector. Others: see Backend.
    """
    groups: dict[tuple[str, str], dict[str, TestVector]] = {}
    for scorer in scorers:
        if (wanted := scorer.derivative()) is None:
            continue
        if not isinstance(wanted.vector, TestVector):
            raise ConfigError(f"the scorer {scorer.name!r} has the header of a test vector alone; give the vector")
        groups.setdefault((wanted.backend, wanted.reduction), {})[scorer.name] = wanted.vector
    made = []
    for (backend, reduction), vectors in groups.items():
        several = list(vectors.values())
        made.append(
            Joint(make_backend(backend, model, several, max_tokens, pad_id, cast(Reduction, reduction)), vectors)
        )
    return made
