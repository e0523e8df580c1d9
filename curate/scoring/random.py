"""Random baseline: a uniform number in [0, 1) that depends on the seed and the example's id alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from curate.scoring.base import Batch, Columns, Needs, Scorer


class Random(Scorer):
    """The same id has the same score in every run, part and order; rows of one id (equal content) share it."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = int(seed)

    def needs(self) -> Needs:
        return Needs()

    def columns(self) -> list[str]:
        return [self.name]

    def score(self, batch: Batch) -> Columns:
        return {self.name: np.array([uniform(self.seed, e.id) for e in batch.examples], dtype=np.float64)}

    def fingerprint(self) -> dict[str, Any]:
        return {"method": self.name, "seed": self.seed}


def uniform(seed: int, example_id: str) -> float:
    """A number in [0, 1) that depends on these two alone."""
    data = f"{seed}\0{example_id}".encode("utf-8", "surrogatepass")
    # 53 bits: what a float64 in [0, 1) can hold without rounding up to 1.
    return (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 11) * 2.0**-53
