"""Read by every Python process of a chaos run: notes each piece of work as it begins, and makes it last longer.

In: CHAOS_LOG (a file to add lines to), CHAOS_PAUSE (seconds); CHAOS_FULL (a file to add lines to) and CHAOS_SEED: some
writes to local files then fail for want of space. A tiny model scores a unit in a millisecond; with a pause
in the middle of each unit, of each chunk that a reader yields and of each file that is written (between its bytes and
its name), a kill at a random moment hits the work and not the waiting around it.

A line is `place<TAB>pid<TAB>what`: place is the URL of the output, what names the unit, shard or checkpoint.
"""

from __future__ import annotations

import errno
import functools
import importlib.machinery as machinery
import os
import random
import time
from collections.abc import Callable
from typing import Any

_LOG, _PAUSE = os.environ.get("CHAOS_LOG"), float(os.environ.get("CHAOS_PAUSE", "0"))
_FULL = os.environ.get("CHAOS_FULL")


def _note(place: str, what: str) -> None:
    line = f"{place}\t{os.getpid()}\t{what}\n".encode()
    fd = os.open(_LOG or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line)  # one write to a file opened for appending: lines of several processes do not mix
    finally:
        os.close(fd)
    time.sleep(_PAUSE)


def _worker(call: Callable[..., bytes]) -> Callable[..., bytes]:
    @functools.wraps(call)
    def noted(self: Any, item: bytes) -> bytes:
        from curate.corpus.chunk import Chunk

        chunk = Chunk.from_bytes(item)
        _note(self.spec.output.url, f"{chunk.key}:{chunk.start}-{chunk.stop}")
        return call(self, item)

    return noted


def _shard(act: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(act)
    def noted(state: Any, shard: Any) -> int:
        _note(shard.url, "")
        return act(state, shard)

    return noted


def _training(act: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(act)
    def noted(session: Any, item: Any) -> Any:
        _note(item[1].url, "")
        return act(session, item)

    return noted


def _reader(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def slow(*arguments: Any, **named: Any) -> Any:
        for chunk in read(*arguments, **named):
            time.sleep(_PAUSE / 2)
            yield chunk

    return slow


def _slow_names(os_module: Any) -> Any:
    """connectors.localfile's `os`, whose replace() waits between a file's last byte and its name."""

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(os_module, name)

        @staticmethod
        def replace(source: Any, target: Any) -> None:
            time.sleep(_PAUSE / 2)
            os_module.replace(source, target)

    return Slow()


def _full_disk(io_module: Any) -> Any:
    """connectors.localfile's `io`, whose files take a part of what is written, or none, when the disk is full."""
    draw = random.Random(os.environ["CHAOS_SEED"])

    class File(io_module.FileIO):
        def write(self, data: Any) -> int:
            if draw.random() < 0.06:
                with open(_FULL or os.devnull, "ab", buffering=0) as told:
                    told.write(b"full\n")
                super().write(memoryview(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(super().write(data))

    class Full:
        FileIO = File

        def __getattr__(self, name: str) -> Any:
            return getattr(io_module, name)

    return Full()


def _change(module: Any) -> None:
    match module.__name__:
        case "curate.runtime.score":
            module.ScoreWorker.__call__ = _worker(module.ScoreWorker.__call__)
        case "curate.runtime.generate":
            module.GenerateWorker.__call__ = _worker(module.GenerateWorker.__call__)
        case "curate.runtime.fit":
            module._covariance, module._correction = _shard(module._covariance), _shard(module._correction)
        case "curate.runtime.sweep":
            module._in_actor = _training(module._in_actor)
        case "curate.runtime.reader":
            module.read_chunks = _reader(module.read_chunks)
        case "connectors.localfile":
            module.os = _slow_names(module.os)
            if _FULL:
                module.io = _full_disk(module.io)


if _LOG:
    _load = machinery.SourceFileLoader.exec_module

    def _exec(self: Any, module: Any) -> None:
        _load(self, module)
        _change(module)

    machinery.SourceFileLoader.exec_module = _exec  # type: ignore[method-assign]
