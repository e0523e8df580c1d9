"""Traffic: what this process has read from and written to storage, since it began.

Counted where it happens (storage.py and the files it opens); whoever exports metrics asks for it. Knows no metrics.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written; requests made again after a failure, and those that failed for good."""

    read: int = 0
    written: int = 0
    retries: int = 0
    errors: int = 0


_now = Traffic()
_lock = threading.Lock()


def now() -> Traffic:
    """So far."""
    return _now


def add(read: int = 0, written: int = 0, retries: int = 0, errors: int = 0) -> None:
    """Count; threads may do so at once."""
    global _now
    with _lock:
        t = _now
        _now = replace(
            t, read=t.read + read, written=t.written + written, retries=t.retries + retries, errors=t.errors + errors
        )
