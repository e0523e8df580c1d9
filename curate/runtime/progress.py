"""Progress of long work: one line every few seconds, and a bar on a terminal. Also what Ray's metrics count, and the
note that `curate status` reads.

Lines go to stderr, as text, or as JSON with CURATE_LOG=json (see events.py).
"""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

from tqdm import tqdm

from curate.runtime import events, metrics, run_note
from curate.runtime.events import say
from curate.runtime.run_note import StageNote

EVERY_SECONDS = 5.0


def show_log() -> None:
    """Show what the library logs (a model that is converted once, say), and no bars of other libraries."""
    from transformers.utils import logging as transformers_logging  # seconds; tasks that only move rows come here too

    transformers_logging.disable_progress_bar()
    events.listen()


class Done(NamedTuple):
    """What an actor answers of one piece of work: see `Progress.add`."""

    rows: int
    tokens: int = 0
    bad: int = 0
    flops: float = 0.0
    busy: float = 0.0
    peak: float | None = None


class Progress:
    """Counts rows (or what `unit` says) of one stage. `already` of them were done by an earlier run; `place`: the
    output whose parts they are, where that is what the stage makes; `items`: units of work that are still to do."""

    def __init__(
        self, stage: str, total: int, already: int = 0, unit: str = "rows", place: str | None = None, items: int = 0
    ) -> None:
        self.stage, self.total, self.rows, self.tokens, self.bad = stage, total, already, 0, 0
        self.already, self.unit, self.items = already, unit, items
        self.began = self._said = time.monotonic()
        self._flops = self._could = 0.0  # since the last line: done, and possible in the same time
        terminal = sys.stderr.isatty() and not events.as_json()
        self._bar = tqdm(total=total, initial=already, desc=stage, unit=unit.rstrip("s")) if terminal else None
        self._before = events.set_stage(stage)
        self.note = run_note.begin(StageNote(stage, total, unit, already, place=place))
        metrics.level("curate_queue", items, stage)
        if already:
            say(f"{stage}: resuming", None, **{f"{unit}_done": already, f"{unit}_left": total - already})

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(
        self, rows: int, tokens: int = 0, bad: int = 0, flops: float = 0.0, busy: float = 0.0, peak: float | None = None
    ) -> None:
        """Another committed range, of `flops` in `busy` seconds of a worker whose device can do `peak` FLOP/s."""
        self.rows += rows
        self.tokens += tokens
        self.bad += bad
        self.items = max(0, self.items - 1)
        self.note.done, self.note.tokens, self.note.bad = self.rows, self.tokens, self.bad
        counted = {"curate_rows": rows, "curate_tokens": tokens, "curate_quarantined": bad, "curate_flops": flops}
        for name, n in counted.items():
            metrics.count(name, n, self.stage)
        metrics.level("curate_queue", self.items, self.stage)
        metrics.flush()
        if peak:
            self._flops += flops
            self._could += busy * peak
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
            **self._share(),
        )

    def _share(self) -> dict[str, Any]:
        """The share of the devices' peak since the last line, where it is known."""
        if not self._could:
            return {}
        share = self._flops / self._could
        metrics.level("curate_share_of_peak", share, self.stage)
        self._flops = self._could = 0.0
        return {"peak": f"{share:.1%}"}

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        rate = (self.rows - self.already) / max(self.seconds, 1e-9)
        done: dict[str, Any] = {self.unit: self.rows}
        say(f"{self.stage}: done", **done, seconds=f"{self.seconds:.1f}", rate=f"{rate:.1f}/s", **self._share())
        self.note.ended = time.time()
        metrics.flush()
        metrics.level("curate_queue", 0, self.stage)
        events.set_stage(self._before)
