"""Pace: when the next request may start. In: a limit a minute, and pauses that a server asks for. Knows no request.

Starts are spaced evenly, 60/limit seconds apart: no window of a minute holds more than `limit` of them, and no shorter
window that a server may count by holds more than its share.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """For any number of threads.

    Args:
        per_minute: starts in a minute; None = no limit of one's own.
        clock: seconds, never backwards. sleep: waits so many seconds, or until the event is set.
    """

    def __init__(
        self,
        per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = self._until = float("-inf")

    def wait(self, give_up: threading.Event) -> None:
        """Return when this thread's request may start, or `give_up` is set."""
        while not give_up.is_set():
            with self._lock:
                now = self._clock()
                left = max(self._next, self._until) - now
                if left <= 0:
                    self._next = now + self._gap
                    return
            self._sleep(give_up, left)

    def hold(self, seconds: float) -> None:
        """No request starts for so many seconds."""
        if seconds > 0:
            with self._lock:
                self._until = max(self._until, self._clock() + seconds)
