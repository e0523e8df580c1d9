"""Progress of long work: one line every few seconds, and a bar on a terminal. Also counters for Ray's metrics.

Lines go to stderr, as text, or as JSON with CURATE_LOG=json.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

from ray.util import metrics
from tqdm import tqdm

EVERY_SECONDS = 5.0


def say(message: str, **fields: Any) -> None:
    """One event for the person or the log collector who reads stderr."""
    if os.environ.get("CURATE_LOG") == "json":
        event = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": message, **fields}
        print(json.dumps(event, ensure_ascii=False, default=str), file=sys.stderr, flush=True)
    else:
        tail = "".join(f" {k}={v}" for k, v in fields.items())
        tqdm.write(f"{message}{tail}", file=sys.stderr)


class _Said(logging.Handler):
    """The library's own log, said like everything else."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage() if record.levelno < logging.WARNING else f"WARNING: {record.getMessage()}")


def show_log() -> None:
    """Show what the library logs (a model that is converted once, say), and no bars of other libraries."""
    from transformers.utils import logging as transformers_logging  # seconds; tasks that only move rows come here too

    transformers_logging.disable_progress_bar()
    library = logging.getLogger("curate")
    if not library.handlers:
        library.addHandler(_Said())
        library.setLevel(logging.INFO)


class Progress:
    """Counts rows (or what `unit` says) of one stage. `already` of them were done by an earlier run."""

    def __init__(self, stage: str, total: int, already: int = 0, unit: str = "rows") -> None:
        self.stage, self.total, self.rows, self.tokens, self.bad = stage, total, already, 0, 0
        self.already, self.unit = already, unit
        self.began = self._said = time.monotonic()
        terminal = sys.stderr.isatty() and os.environ.get("CURATE_LOG") != "json"
        self._bar = tqdm(total=total, initial=already, desc=stage, unit=unit.rstrip("s")) if terminal else None
        tags = ("stage",)
        self._rows = metrics.Counter("curate_rows", "Rows done", tags)
        self._tokens = metrics.Counter("curate_tokens", "Tokens through the model", tags)
        self._bad = metrics.Counter("curate_quarantined", "Rows quarantined", tags)
        if already:
            say(f"{stage}: resuming", **{f"{unit}_done": already, f"{unit}_left": total - already})

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, rows: int, tokens: int = 0, bad: int = 0) -> None:
        """Another committed range."""
        self.rows += rows
        self.tokens += tokens
        self.bad += bad
        for counter, n in ((self._rows, rows), (self._tokens, tokens), (self._bad, bad)):
            if n:
                counter.inc(n, {"stage": self.stage})
        if self._bar is not None:
            self._bar.update(rows)
        elif time.monotonic() - self._said >= EVERY_SECONDS:
            self._said = time.monotonic()
            self._line()

    def _line(self) -> None:
        rate = (self.rows - self.already) / max(self.seconds, 1e-9)
        left = (self.total - self.rows) / rate if rate else float("inf")
        say(
            f"{self.stage}: {self.rows:,}/{self.total:,} {self.unit}",
            rate=f"{rate:.1f}/s",
            tokens=self.tokens,
            quarantined=self.bad,
            left=f"{left:.0f}s",
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        rate = (self.rows - self.already) / max(self.seconds, 1e-9)
        done: dict[str, Any] = {self.unit: self.rows}
        say(f"{self.stage}: done", **done, seconds=f"{self.seconds:.1f}", rate=f"{rate:.1f}/s")
