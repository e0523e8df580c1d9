"""What the benchmarks share: a JSON line for each figure, the machine it was taken on, memory of a tree of processes.

Knows no model, no corpus and no cluster.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

Value = float | Mapping[str, float]
Classify = Callable[[psutil.Process], str]
GIB = 2**30


def emit(
    bench: str,
    metric: str,
    value: Value,
    unit: str,
    ratio: float | None = None,
    against: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Print one JSON line. `value` is a number, or named numbers of one unit (a series); `ratio` is value / `against`.

    Raises:
        ValueError: a number is not finite; JSON has none such.
    """
    line = {
        "bench": bench,
        "metric": metric,
        "value": {k: _short(v) for k, v in value.items()} if isinstance(value, Mapping) else _short(value),
        "unit": unit,
        "ratio": None if ratio is None else _short(ratio),
        "against": against,
        "settings": dict(settings or {}),
    }
    print(json.dumps(line, allow_nan=False, ensure_ascii=False), flush=True)


def _short(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def machine() -> dict[str, Any]:
    """What the figures were taken on. `load` is the average before the run: above 0.5 or so, others were working."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = round(psutil.virtual_memory().total / GIB, 1)
    return {"cpu": model, "cores": psutil.cpu_count(), "memory_gib": memory, "load": round(os.getloadavg()[0], 2)}


@dataclass(frozen=True)
class MemorySample:
    """Bytes of each group of processes at one time (`time.time()`).

    `rss` counts a page once for every process that maps it, the object store's shared pages too; `private` is rss
    without shared pages.
    """

    at: float
    rss: Mapping[str, int]
    private: Mapping[str, int]
    extra: Mapping[str, int] = field(default_factory=dict)


class MemorySampler:
    """Samples a process ("driver"; this one, or `pid`) and its descendants every `interval` seconds while the block
    runs, or until it has ended.

    Args:
        classify: the group of a descendant.
        extra: other byte counts to take at every sample.
    """

    def __init__(
        self,
        classify: Classify = lambda process: "children",
        interval: float = 0.5,
        extra: Callable[[], Mapping[str, int]] = dict,
        pid: int | None = None,
    ) -> None:
        self.samples: list[MemorySample] = []
        self._root = psutil.Process(pid)
        self._classify, self._interval, self._extra = classify, interval, extra
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self._root.is_running():
            try:
                self.samples.append(self._sample(self._root))
            except psutil.Error:  # it has just ended
                return
            if self._stop.wait(self._interval):
                return

    def _sample(self, root: psutil.Process) -> MemorySample:
        rss: dict[str, int] = {}
        private: dict[str, int] = {}
        for process in [root, *root.children(recursive=True)]:
            try:
                group = "driver" if process.pid == root.pid else self._classify(process)
                info = process.memory_info()
            except psutil.Error:  # it ended between being listed and being read
                continue
            rss[group] = rss.get(group, 0) + info.rss
            private[group] = private.get(group, 0) + info.rss - getattr(info, "shared", 0)
        return MemorySample(time.time(), rss, private, self._extra())


def series(points: Sequence[tuple[float, float]], begin: float, end: float) -> dict[str, float]:
    """`points` (time, value) at the start, the quartiles and the end of [begin, end], and the largest within.

    A value at a time is the median of the points within a fortieth of the length, or the nearest point.

    Raises:
        ValueError: no point lies in [begin, end].
    """
    inside = [(t, v) for t, v in points if begin <= t <= end]
    if not inside:
        raise ValueError("the stage was too short to be sampled; give it more rows")

    def at(moment: float) -> float:
        near = [v for t, v in inside if abs(t - moment) <= (end - begin) / 40]
        return statistics.median(near) if near else min(inside, key=lambda p: abs(p[0] - moment))[1]

    out = {name: at(begin + (end - begin) * q / 4) for q, name in enumerate(("start", "q1", "q2", "q3", "end"))}
    return {**out, "max": max(v for _, v in inside)}
