"""Metrics for Prometheus, by way of Ray: each node's agent exports what its processes count as ray_<name>[_total].

In: numbers, counted in the driver or in the process that does the work. Out: counters and gauges by stage. What goes
through storage is counted there (connectors/traffic.py) and brought here by `flush`. Without a cluster nothing is
exported.
"""

from __future__ import annotations

from functools import cache

from ray.util import metrics

from connectors import traffic
from curate.runtime.events import scene

COUNTERS = {
    "curate_rows": "Rows done; of a stage that counts something else, that (trainings, prompts, matrices)",
    "curate_tokens": "Tokens through the model",
    "curate_quarantined": "Rows quarantined",
    "curate_flops": "Floating-point operations of forward and backward passes",
    "curate_bytes_read": "Bytes read from storage",
    "curate_bytes_written": "Bytes written to storage",
    "curate_storage_retries": "Requests to storage that were made again",
    "curate_storage_errors": "Requests to storage that failed for good",
    "curate_worker_starts": "Times a worker was started; more than the pool's size are replacements",
}
GAUGES = {
    "curate_queue": "Units that are not committed yet",
    "curate_share_of_peak": "FLOPs of the stage, as a share of what its busy workers' devices can do",
}
ERRORS = "curate_errors"
_BY_TRAFFIC = {
    "read": "curate_bytes_read",
    "written": "curate_bytes_written",
    "retries": "curate_storage_retries",
    "errors": "curate_storage_errors",
}


@cache
def _counter(name: str) -> metrics.Counter:
    if name == ERRORS:
        return metrics.Counter(name, "Errors that ended a stage, by kind", ("stage", "kind"))
    return metrics.Counter(name, COUNTERS[name], ("stage",))


@cache
def _gauge(name: str) -> metrics.Gauge:
    return metrics.Gauge(name, GAUGES[name], ("stage",))


def renew() -> None:
    """Forget the metrics of a Ray that this process has left: another one's agents do not know them."""
    _counter.cache_clear()
    _gauge.cache_clear()


def count(name: str, n: float, stage: str | None = None) -> None:
    """Add `n` to a counter of `stage`, by default the one this process works for."""
    if n > 0:
        _counter(name).inc(n, {"stage": stage or scene().stage or ""})


def level(name: str, value: float, stage: str) -> None:
    """Set a gauge."""
    _gauge(name).set(value, {"stage": stage})


def error(kind: str) -> None:
    """An error that ends the stage."""
    _counter(ERRORS).inc(1, {"stage": scene().stage or "", "kind": kind})


_told = traffic.Traffic()


def flush() -> None:
    """Count what went through storage since the last call."""
    global _told
    now = traffic.now()
    for name, metric in _BY_TRAFFIC.items():
        count(metric, getattr(now, name) - getattr(_told, name))
    _told = now
