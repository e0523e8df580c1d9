"""What is killed when: a seed becomes trials, each a job with some kills of one kind at moments drawn at random.

Pure: knows neither Ray nor processes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = {
    "driver": "the job's own process",
    "actor": "an actor that scores, fits, generates or trains",
    "reader": "a task that reads and tokenises",
    "raylet": "the raylet of a node",
    "node": "every process of a node at once",
    "mixed": "these in turn, in one run",
    "errors": "requests to the store that fail",
    "outages": "a store that fails many requests in a row",
    "slow": "a store that answers late",
    "truncated": "answers of the store that are cut off",
    "full": "writes to a full disk",
}


@dataclass(frozen=True)
class Moment:
    """When the job has committed `commits` pieces and `wait` more seconds have gone by; `draw` (0 to 1) chooses among
    those of `kind` that may be hit."""

    kind: str
    commits: int
    wait: float
    draw: float


@dataclass(frozen=True)
class Trial:
    """One run of `job` with kills of one `kind`; `number` counts the trials of the same job and kind."""

    seed: int
    job: str
    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.job}-{self.kind}-{self.seed}-{self.number}"

    def moments(self, commits: int, kills: int, pause: float, kinds: Sequence[str] = ()) -> list[Moment]:
        """`kills` moments between the first and the last of `commits` commits, in order. `pause` is what a piece of
        work takes, so that the wait ends anywhere within one. `kinds`: those that a mixed trial takes in turn.

        Raises:
            ValueError: fewer commits than that allows.
        """
        if commits < kills + 2:
            raise ValueError(f"{commits} commits leave no room for {kills} kills between the first and the last")
        draw = random.Random(f"{self.seed}/{self.job}/{self.kind}/{self.number}")
        at = sorted(draw.sample(range(1, commits - 1), kills))
        each = kinds if self.kind == "mixed" else [self.kind]
        turns = [each[i % len(each)] for i in range(kills)]
        draw.shuffle(turns)
        return [Moment(k, n, draw.uniform(0, 2 * pause), draw.random()) for k, n in zip(turns, at, strict=True)]
