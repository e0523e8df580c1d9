"""A lease: one process at a time works in a place, and one that dies does not keep it.

In: the URL of a small file. Out: a context in which this process is the owner. Renewed by a thread while it runs; one
that has not been renewed for its length is stale and taken over. Clocks of the machines must agree to within that.
Knows nothing of what an audit does.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from connectors import exchange
from curate.errors import CurateError, LeaseError, StorageError
from curate.runtime.events import say


@dataclass(frozen=True)
class Holder:
    """What the file holds: who, since when, when last renewed (seconds since 1970), and for how long that counts."""

    owner: str
    host: str
    pid: int
    began: float
    renewed: float
    seconds: float

    def live(self, now: float) -> bool:
        return now < self.renewed + self.seconds

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Holder | None:
        """None for what is no lease: nobody can be named as its owner."""
        try:
            return Holder(**json.loads(data))
        except (ValueError, TypeError):
            return None


class Lease:
    """`with Lease(url, seconds): …`. `wait`: rather than fail at a live one, wait until it ends or goes stale."""

    def __init__(self, url: str, seconds: float, wait: bool = False, clock: Callable[[], float] = time.time) -> None:
        self.url, self.seconds, self.wait, self._clock = url, seconds, wait, clock
        now = clock()
        self._mine = Holder(secrets.token_hex(8), platform.node(), os.getpid(), now, now, seconds)
        self._written = b""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: CurateError | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Lease:
        """Raises:
        LeaseError: another live process holds it.
        """
        said = False
        while (holder := self._try()) is not None:
            left = holder.renewed + holder.seconds - self._clock()
            if not self.wait:
                raise LeaseError(
                    f"another audit is at work: {self.url} is held by process {holder.pid} on {holder.host!r}, renewed "
                    f"{max(0.0, self._clock() - holder.renewed):.0f} s ago. Wait for its end; if that process is dead, "
                    f"the lease is free in {max(0.0, left):.0f} s. audit.locked=wait waits, audit.locked=skip ends well"
                )
            if not said:
                say(f"audit: waiting for the lease {self.url}", held_by=f"process {holder.pid} on {holder.host}")
                said = True
            self._end.wait(max(0.2, min(5.0, self.seconds / 10)))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def _try(self) -> Holder | None:
        """Take it and return None; else who holds it."""
        found = exchange.read(self.url)
        holder = Holder.from_bytes(found) if found is not None else None
        now = self._clock()
        if holder is not None and holder.live(now):
            return holder
        mine = replace(self._mine, began=now, renewed=now)
        if not exchange.swap(self.url, found, mine.to_bytes()):
            other = exchange.read(self.url)
            return (Holder.from_bytes(other) if other else None) or replace(mine, host="unknown", pid=0)
        if holder is not None:
            age = now - holder.renewed
            say(
                f"audit: took over a stale lease of process {holder.pid} on {holder.host!r}, "
                f"which has not renewed it for {age:.0f} s"
            )
        self._mine, self._written = mine, mine.to_bytes()
        return None

    def _renew(self) -> None:
        while not self._end.wait(self.seconds / 4) and self._lost is None:
            self._renew_once()

    def _renew_once(self) -> None:
        with self._lock:
            renewed = replace(self._mine, renewed=self._clock())
            try:
                if not exchange.swap(self.url, self._written, renewed.to_bytes()):
                    self._lost = LeaseError(
                        f"the lease {self.url} was taken over by another audit: this one stood still for longer than "
                        f"audit.lease_seconds={self.seconds:g}. Nothing was committed; run again"
                    )
                    return
            except StorageError as e:
                if self._clock() > self._mine.renewed + self.seconds:
                    self._lost = LeaseError(f"the lease {self.url} could not be renewed ({e}); run again")
                    return
                say(f"WARNING: the lease could not be renewed, trying again: {e}")
                return
            self._mine, self._written = renewed, renewed.to_bytes()

    def check(self) -> None:
        """Still the owner? To be asked before a result is committed. A lease that went stale while this process stood
        still, and that nobody has taken, is renewed.

        Raises:
            LeaseError: another process has taken over, or the lease cannot be renewed.
        """
        if self._lost is None and not self._mine.live(self._clock()):
            self._renew_once()
        if self._lost is not None:
            raise self._lost

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            try:
                exchange.swap(self.url, self._written, None)
            except StorageError as e:
                say(f"WARNING: the lease could not be given back and ends in {self.seconds:.0f} s: {e}")
