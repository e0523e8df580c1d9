"""Events: what the library says on stderr, as text for a person or as JSON lines for a log collector (CURATE_LOG=json).

In: a message and fields. Out: one line. A JSON line names the run, the job and the stage it belongs to, and the unit
where it speaks of one; workers say the same, because the scene travels with the work. Knows no Ray and no progress.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

RUN, JOB, FORMAT = "CURATE_RUN", "CURATE_JOB", "CURATE_LOG"


@dataclass(frozen=True)
class Scene:
    """Where the program is. `run` is the same for every attempt at the same work; `json`: how lines look."""

    run: str | None = None
    job: str | None = None
    stage: str | None = None
    json: bool = False


_stage: str | None = None
_unit: str | None = None


def as_json() -> bool:
    """Are lines JSON?"""
    return os.environ.get(FORMAT) == "json"


def scene() -> Scene:
    """Where this process is now, for one that works for it."""
    return Scene(os.environ.get(RUN), os.environ.get(JOB), _stage, as_json())


def enter(given: Scene) -> None:
    """Take over the scene of the process that gave this one its work, for its children too; and say what the library
    logs."""
    _set(RUN, given.run)
    _set(JOB, given.job)
    if given.json != as_json():
        _set(FORMAT, "json" if given.json else None)
    set_stage(given.stage)
    listen()


def set_stage(name: str | None) -> str | None:
    """The stage that lines belong to from now on; returns the one before."""
    global _stage
    before, _stage = _stage, name
    return before


@contextmanager
def run_of(run: str, job: str) -> Iterator[None]:
    """The block is the job `job`, at the work `run`."""
    before = scene()
    set_stage(None)
    _set(RUN, run)
    _set(JOB, job)
    try:
        yield
    finally:
        set_stage(before.stage)
        _set(RUN, before.run)
        _set(JOB, before.job)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def about(unit: str) -> Iterator[None]:
    """Lines of the block speak of `unit`, named by its file and rows."""
    global _unit
    before, _unit = _unit, unit
    try:
        yield
    finally:
        _unit = before


def say(message: str, level: str | None = None, **fields: Any) -> None:
    """One event for the person or the log collector who reads stderr. A message that begins with "WARNING: " is one."""
    if not as_json():
        tail = "".join(f" {k}={v}" for k, v in fields.items())
        _print(f"{message}{tail}")
        return
    now = scene()
    about = {"run": now.run, "job": now.job, "stage": now.stage, "unit": _unit}
    plain = message.removeprefix("WARNING: ")
    event = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level or ("warning" if plain != message else "info"),
        "event": plain,
        **{name: value for name, value in about.items() if value is not None},
        **fields,
    }
    print(json.dumps(event, ensure_ascii=False, default=str), file=sys.stderr, flush=True)


def note(message: str, **fields: Any) -> None:
    """An event for log collectors alone: too fine for a person."""
    if as_json():
        say(message, **fields)


def _print(line: str) -> None:
    # Only where bars may stand is tqdm loaded already; it puts the line above them.
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


class _Said(logging.Handler):
    """The library's own log, said like everything else."""

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno >= logging.WARNING
        level = record.levelname.lower() if record.levelno != logging.INFO else None
        say(f"WARNING: {record.getMessage()}" if warns else record.getMessage(), level)


def listen() -> None:
    """Say what the library logs, and in JSON also the exception that ends the process."""
    library = logging.getLogger("curate")
    if not library.handlers:
        library.addHandler(_Said())
        library.setLevel(logging.INFO)
    if as_json():
        sys.excepthook = _last_words


def _last_words(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    trace = "".join(traceback.format_exception(kind, error, at))
    say(f"{kind.__name__}: {error}", "critical", traceback=trace)
