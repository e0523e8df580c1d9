"""Known label: the ceiling of a retraining sweep, a ranking that has every labelled row on its right side.

No method may see labels; this one is there to tell how much any ranking could have changed. Rows with the label come
before all others, and within each of the two in an order of chance, drawn from seed and id.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from curate.scoring.base import Batch, Columns, Needs, Scorer
from curate.scoring.random import uniform


class KnownLabel(Scorer):
    """1 to 1.5 for rows with the label `positive`, 0 to 0.5 for other labels; NaN for rows without one."""

    name = "known_label"

    def __init__(self, positive: str, seed: int = 0) -> None:
        self.positive, self.seed = str(positive), int(seed)

    def needs(self) -> Needs:
        return Needs()

    def columns(self) -> list[str]:
        return [self.name]

    def score(self, batch: Batch) -> Columns:
        found = [
            np.nan if e.label is None else float(e.label == self.positive) + uniform(self.seed, e.id) / 2
            for e in batch.examples
        ]
        return {self.name: np.array(found, dtype=np.float64)}

    def fingerprint(self) -> dict[str, Any]:
        return {"method": self.name, "positive": self.positive, "seed": self.seed}
