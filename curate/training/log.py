"""The log of a training: one JSON line every few steps at <training>/log.jsonl, streamed while it runs.

Lines: step, of (steps in all), loss (nats a token, the mean of the steps since the line before), learning_rate,
grad_norm, rows, tokens, flops (all since the beginning), peak (FLOP/s that the devices can do together, where it is
known), seconds (of work, over all runs of a resumed training). An object store cannot append, so the whole file is
written again; at most every few seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from connectors import storage

EVERY_SECONDS = 3.0
NAME = "log.jsonl"


def read_log(url: str) -> list[dict[str, Any]]:
    """The lines of the training at `url`, so far."""
    where = storage.join(url, NAME)
    if not storage.exists(where):
        return []
    return [json.loads(line) for line in storage.read_text(where).split("\n") if line]


def share_of_peak(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{"peak": what trainings, of which these are the newest lines, do of what their devices can}, where that is known
    of all of them; to be said."""
    found = list(lines)
    if not found or any(line["peak"] is None for line in found):
        return {}
    rate = sum(line["flops"] / max(line["seconds"], 1e-9) for line in found)
    return {"peak": f"{rate / sum(line['peak'] for line in found):.1%}"}


class TrainingLog:
    """Written by one process. After a resume at step n it goes on behind the lines of the steps up to n."""

    def __init__(self, url: str, resumed: int) -> None:
        self.url = storage.join(url, NAME)
        self.lines = [line for line in read_log(url) if line["step"] <= resumed]
        self._written = 0.0

    @property
    def seconds(self) -> float:
        return float(self.lines[-1]["seconds"]) if self.lines else 0.0

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if time.monotonic() - self._written > EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        """All lines, now."""
        storage.write_atomic(self.url, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._written = time.monotonic()
