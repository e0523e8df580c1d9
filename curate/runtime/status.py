"""The status of an output place, read from what lies there: no Ray, no model, from any machine, while a run works or
after it.

In: the URL of a sink, of one product, or of a store. Out: stages with what is done of them, at which rate, and what is
quarantined. What is done is told by the parts and markers themselves; which stages there are to be, and whether the
driver is alive, by the notes of the jobs (run_note.py). Where a sink has no notes, its layout tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from connectors import storage
from curate.errors import StorageError
from curate.runtime.run_note import located, read_notes
from curate.runtime.status_layout import audit_stages, audited, ledger_stage, product, sink_stages, store_stages
from curate.runtime.status_stages import Stage, markers_stage, parts_stage, scope

SILENT_SECONDS = 60.0  # a driver writes its note every 10 s

State = Literal["complete", "running", "stalled", "silent", "failed", "interrupted", "incomplete"]
"""running: the driver writes its note, and parts come; stalled: no part for long; silent: the driver does not write."""


@dataclass(frozen=True)
class Run:
    """One job and its stages. Without a note `job` and `run` are empty."""

    job: str
    run: str
    state: State
    message: str
    started: float | None
    updated: float | None
    host: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Status:
    """Of a place. `products`: what is there for people, by name."""

    url: str
    state: State
    now: float
    runs: tuple[Run, ...]
    products: Mapping[str, str] = field(default_factory=dict)


def read_status(url: str, now: float, stalled_seconds: float = 600.0) -> Status:
    """The status of the place `url` at the time `now` (seconds since 1970). A run of which no part was written for
    `stalled_seconds` counts as stalled.

    Raises:
        StorageError: it cannot be read, or nothing of ours is there.
    """
    url = url.rstrip("/")
    notes = read_notes(url)
    if notes:
        runs = _superseded([_run(note, url, now, stalled_seconds) for note in notes])
    elif stages := product(url) or sink_stages(url) or store_stages(url):
        whole = all(s.complete for s in stages)
        state: State = "complete" if whole else "incomplete"
        if not whole:  # no driver tells of itself: only its parts do
            last = max((s.last for s in stages if s.last is not None), default=None)
            if last is not None:
                state = "running" if now - last < stalled_seconds else "stalled"
        runs = [Run("", "", state, "", None, None, "", tuple(stages))]
    else:
        raise StorageError(
            f"nothing of curate's is at {url}: no _status, manifest.parquet, recipe.json or products; give the "
            f"sink.url of a run, the place of one product, or a store (sink.store)"
        )
    found = [r.state for r in runs]
    order: tuple[State, ...] = ("failed", "running", "stalled", "silent", "interrupted", "incomplete")
    return Status(url, next((s for s in order if s in found), "complete"), now, tuple(runs), _products(url))


# runs


def _run(note: Mapping[str, Any], sink: str, now: float, stalled: float) -> Run:
    updated = float(note["updated"])
    stages = tuple(_stage(s, note["job"], sink, updated) for s in note["stages"])
    stages += tuple(audit_stages(sink) if note["job"] == "audit" else ())
    state: State
    if note["state"] == "done":
        # What lies in a store may have been cleared away since; what lies in the sink is its product.
        state = "incomplete" if any(not s.complete and (s.place or "").startswith(sink) for s in stages) else "complete"
    elif note["state"] in ("failed", "interrupted"):
        state = note["state"]
    elif now - updated > SILENT_SECONDS:
        state = "silent"
    else:
        began = [float(s["began"]) for s in note["stages"]]
        newest = max([*(s.last for s in stages if s.last is not None), *began], default=updated)
        state = "stalled" if now - newest > stalled else "running"
    host = f"{note['host']}, process {note['pid']}"
    return Run(note["job"], note["run"], state, note["message"], note["started"], updated, host, stages)


def _superseded(runs: Sequence[Run]) -> list[Run]:
    """Without the runs that did not end well and whose stages a later one has completed."""
    kept = []
    for i, run in enumerate(runs):
        later = {s.stage for r in runs[i + 1 :] for s in r.stages if s.complete}
        if run.state in ("complete", "running") or not {s.stage for s in run.stages} <= later:
            kept.append(run)
    return kept


def _stage(note: Mapping[str, Any], job: str, sink: str, updated: float) -> Stage:
    name, unit, total = note["stage"], note["unit"], int(note["total"])
    place = located(note["place"], sink) if note["place"] else None
    if place is not None and not audited(place):
        return parts_stage(name, place, scope(place, sink, total), total, unit)
    if name == "select" and (manifest := scope(storage.join(sink, "ledger"), sink, total)) is not None:
        return ledger_stage(storage.join(sink, *(["groups"] if job == "groups" else []), "ledger"), manifest)
    if note["places"]:
        return markers_stage(name, {k: located(u, sink) for k, u in note["places"].items()}, note["marker"], unit)
    done, ended = int(note["done"]), note["ended"]
    spent = (ended or updated) - note["began"]
    rate = (done - int(note["already"])) / spent if spent > 0 else None
    whole = ended is not None and done >= total
    left = (total - done) / rate if rate and not whole else None
    return Stage(name, unit, done, total, whole, "driver", None, int(note["bad"]), (), ended, rate, left)


# what else is told


_PRODUCTS: tuple[str, ...] = (
    "report.html",
    "summary.json",
    "retrain.html",
    "sae.html",
    "trace.html",
    "latents.html",
    "groups.html",
)
_PRODUCTS += ("evaluation.json", "layer_stride.html", "audits/index.html", "curated", "groups/curated", "adapter")


def _products(url: str) -> dict[str, str]:
    """What a sink has for people."""
    urls = {name: storage.join(url, name) for name in _PRODUCTS}
    with ThreadPoolExecutor(16) as pool:
        there = pool.map(storage.exists, urls.values())
    return {name: where for (name, where), yes in zip(urls.items(), there, strict=True) if yes}
