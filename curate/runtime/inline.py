"""Inline runs: every stage in this process, one item after another, without a cluster.

For debugging a method (a breakpoint in a scorer stops where it stands) and for corpora of a few hundred rows, where
starting actors costs more than they save. Nothing is retried: what fails, fails where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from curate.runtime.lost import device_errors_in_words

_ON: ContextVar[bool] = ContextVar("curate_inline", default=False)


@dataclass(frozen=True)
class Held:
    """Stands for a reference into an object store."""

    value: Any


def is_inline() -> bool:
    """True within `inline()`."""
    return _ON.get()


@contextmanager
def inline() -> Iterator[None]:
    """Run the stages of the block in this process."""
    token = _ON.set(True)
    try:
        yield
    finally:
        _ON.reset(token)


def run_inline(
    items: Sequence[bytes],
    make_worker: Callable[[], Callable[[bytes], bytes]],
    read: Callable[[bytes], Iterator[bytes]] | None,
) -> Iterator[bytes]:
    """What `stream` does: one worker, each item read and answered in turn."""
    if not items:
        return
    with device_errors_in_words():
        work = make_worker()
    for item in items:
        for chunk in read(item) if read is not None else (item,):
            with device_errors_in_words():
                answer = work(chunk)
            yield answer
