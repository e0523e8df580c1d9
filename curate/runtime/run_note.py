"""The note of a run: <sink>/_status/<job>.json, written again every few seconds while a job runs, for `curate status`.

In: what the stages of a job say of themselves. Out: one small file: which run, since when, whether it goes on, its
stages with their totals, and where the parts of each lie. It says what to expect and that the driver is alive; what is
done is read from the parts. Resume never reads it, and a job does not fail where it cannot be written. Knows no Ray.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from connectors import storage
from curate import __version__
from curate.errors import CurateError, DriftFound, StorageError
from curate.runtime.events import say

FOLDER = "_status"
EVERY_SECONDS = 10.0  # a small PUT each; a reader calls a driver silent after several of them


@dataclass
class StageNote:
    """One stage. `already` of the `total` were done by earlier runs. `place`: the Output whose parts are its product;
    `places`: folders, by what they are of, that each get the file `marker` last. Times in seconds of the epoch."""

    stage: str
    total: int
    unit: str
    already: int = 0
    done: int = 0
    tokens: int = 0
    bad: int = 0
    place: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    marker: str | None = None
    began: float = 0.0
    ended: float | None = None


class RunNote:
    """Of one job that runs. Nothing is written before the first stage begins: a job that is refused leaves no trace."""

    def __init__(self, sink: str, job: str, run: str, facts: Mapping[str, Any]) -> None:
        self.sink, self.url = sink.rstrip("/"), storage.join(sink, FOLDER, f"{job}.json")
        host = {"host": socket.gethostname(), "pid": os.getpid()}
        self.head = {"run": run, "job": job, "version": __version__, **host, **facts, "started": time.time()}
        self.stages: list[StageNote] = []
        self.state, self.message = "running", ""
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._told = False

    def stage(self, note: StageNote) -> StageNote:
        """Begin a stage, and write."""
        note.began, note.done = time.time(), note.already
        self.stages = [s for s in self.stages if s.stage != note.stage] + [note]  # again: the newer counts
        first = self._thread is None
        self.write(clean=first)
        if first:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return note

    def write(self, clean: bool = False) -> None:
        """Now. `clean`: and remove what a killed run left half written here."""
        body = {**self.head, "updated": time.time(), "state": self.state, "message": self.message}
        body["stages"] = [self._portable(asdict(s)) for s in list(self.stages)]
        try:
            with self._lock:
                if clean:
                    storage.remove_stale_temps(self.url.rsplit("/", 1)[0])
                storage.write_atomic(self.url, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        except StorageError as e:
            if not self._told:
                say(f"WARNING: `curate status` will not see this run: {e}")
            self._told = True

    def _portable(self, stage: dict[str, Any]) -> dict[str, Any]:
        """With places that mean the same for a reader in another folder."""

        def whole(url: str) -> str:
            if url.startswith(f"{self.sink}/"):
                return "." + url.removeprefix(self.sink)
            return str(storage.local_path(url)) if storage.is_local(url) else url

        places = {name: whole(url) for name, url in stage["places"].items()}
        return {**stage, "place": stage["place"] and whole(stage["place"]), "places": places}

    def _beat(self) -> None:
        while not self._end.wait(EVERY_SECONDS):
            self.write()

    def close(self, state: str, message: str = "") -> None:
        """The job has ended: done, failed or interrupted."""
        self.state, self.message = state, message
        if self._thread is None:
            return
        self._end.set()
        self._thread.join()
        self.write()


_now: RunNote | None = None


@contextmanager
def noted(sink: str, job: str, run: str, facts: Mapping[str, Any]) -> Iterator[None]:
    """Keep the note of the job `job` while the block runs; how the block ends is in it. `facts`: what else to tell."""
    global _now
    _now = mine = RunNote(sink, job, run, facts)
    try:
        yield
    except DriftFound as e:  # the audit is done; what it found is not fine
        mine.close("done", str(e))
        raise
    except CurateError as e:
        mine.close("failed", str(e))
        raise
    except Exception as e:
        mine.close("failed", f"{type(e).__name__}: {e}")
        raise
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            mine.close("done")
        else:
            mine.close("interrupted", f"exit status {e.code}" if isinstance(e, SystemExit) else "by hand")
        raise
    else:
        mine.close("done")
    finally:
        _now = None


def begin(note: StageNote) -> StageNote:
    """Add a stage to the note of the job that runs here, if one does; returns it, to be counted on."""
    return note if _now is None else _now.stage(note)


def located(place: str, sink: str) -> str:
    """The URL of a place that a note of `sink` names."""
    return storage.join(sink, place.removeprefix("./")) if place.startswith("./") else place


def read_notes(sink: str) -> list[dict[str, Any]]:
    """The notes of the jobs that have run into `sink`, in order of their start.

    Raises:
        StorageError: one cannot be read.
    """
    out = []
    for file in storage.glob(storage.join(sink, FOLDER, "*.json")):
        try:
            out.append(json.loads(storage.read_text(file.url)))
        except ValueError as e:
            raise StorageError(f"{file.url} cannot be read ({e}); remove it: the next run writes it anew") from None
    return sorted(out, key=lambda n: n["started"])
