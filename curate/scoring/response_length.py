"""Response length baseline: number of response tokens, the end-of-turn token not counted. Higher = longer."""

from __future__ import annotations

from typing import Any

import numpy as np

from curate.scoring.base import Batch, Columns, Needs, Scorer


class ResponseLength(Scorer):
    """Length of the span that the activation means are taken over, in tokens of the scoring model."""

    name = "response_length"

    def needs(self) -> Needs:
        return Needs(tokens=True)

    def columns(self) -> list[str]:
        return [self.name]

    def score(self, batch: Batch) -> Columns:
        assert batch.rendered is not None
        return {self.name: np.array([r.stop - r.start for r in batch.rendered], dtype=np.float64)}

    def fingerprint(self) -> dict[str, Any]:
        return {"method": self.name}
