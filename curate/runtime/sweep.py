"""The trainings of a sweep: those that are missing are run, as many at once as the cluster holds.

In: one TrainSpec a training. Out: for each what its done.json holds, or why there is none. Each training is recorded in
the store as it ends, so a killed sweep goes on with what is missing; one that fails is told of and the others go on.
Knows no score, no arm and no evaluator.

A training of one process runs in an actor that lives through the whole sweep: its imports, seconds of a small training
that takes not many more, are paid once. One of several processes gets Ray Train's own workers, in a task that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray

from curate.errors import CurateError, WorkerError
from curate.runtime.crew import Crew
from curate.runtime.inline import inline, is_inline
from curate.runtime.progress import Progress, say
from curate.runtime.session import Session
from curate.runtime.stream import worded
from curate.runtime.train import TrainSpec, finished, train

_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Outcome:
    """Of one training: what done.json holds, or the error in words. `now`: it was made in this run."""

    done: Mapping[str, Any] | None
    failed: str | None = None
    now: bool = False


@dataclass(frozen=True)
class Slots:
    """How many trainings fit at once, and the kind of GPU (Ray's name) that all of them run on, None without GPUs."""

    at_once: int
    accelerator: str | None = None


def slots(session: Session, workers: int, at_once: int | None) -> Slots:
    """Of the running cluster, for trainings of `workers` processes each.

    Results of unlike accelerators differ in rounding, which a training amplifies; so of several kinds the one is taken
    that has the most GPUs.
    """
    pool = session.scorers
    if is_inline():
        return Slots(1)
    if not pool.gpus:
        return Slots(max(1, min(at_once or pool.size, pool.size // workers)))
    kinds: Counter[str] = Counter()
    for node in ray.nodes():
        have = node["Resources"] if node["Alive"] else {}
        for name in have:
            if name.startswith(_ACCELERATOR):
                kinds[name.removeprefix(_ACCELERATOR)] += int(have.get("GPU", 0) // pool.gpus)
    if not kinds:
        return Slots(max(1, min(at_once or pool.size, pool.size // workers)))
    kind, gpus = min(kinds.items(), key=lambda k: (-k[1], k[0]))
    if len(kinds) > 1:
        others = ", ".join(sorted(set(kinds) - {kind}))
        say(f"sweep: all trainings run on {kind}; left idle: {others}")
    return Slots(max(1, min(at_once or gpus, gpus // workers)), kind)


def run_trainings(specs: Mapping[str, TrainSpec], session: Session, at_once: int | None) -> dict[str, Outcome]:
    """Train what is not trained yet; see the module's docstring. `at_once`: at most so many at a time.

    Raises:
        WorkerError: workers died again and again. What was done by then stays.
    """
    out = {key: Outcome(done) for key, spec in specs.items() if (done := finished(spec)) is not None}
    todo = [key for key in specs if key not in out]
    if not todo:
        say("sweep: all trainings are done already", trainings=len(specs))
        return {key: out[key] for key in specs}
    first = specs[todo[0]].training
    room = slots(session, first.workers, at_once)
    # The largest first, so that none is left over at the end; largest by the rows it trains on.
    todo.sort(key=lambda key: -_rows(specs[key]))
    progress = Progress("sweep", len(specs), len(out), "trainings")
    for key, done, failed in _each([(k, replace(specs[k], accelerator=room.accelerator)) for k in todo], session, room):
        out[key] = Outcome(done, failed, now=True)
        progress.add(1, done["tokens"] if done else 0)
        if done is None:
            say(f"WARNING: the training {key} failed: {failed}")
        else:
            say(
                f"sweep: trained {key}",
                rows=done["rows"],
                steps=done["steps"],
                loss=f"{done['first_loss']:.3f}→{done['final_loss']:.3f}",
                seconds=f"{done['seconds']:.1f}",
                done=f"{progress.rows}/{progress.total}",
            )
    progress.close()
    return {key: out[key] for key in specs}


def _rows(spec: TrainSpec) -> int:
    return spec.tokens.rows if spec.keep is None else int(spec.keep.sum())


_Item = tuple[str, TrainSpec]
_Answer = tuple[str, dict[str, Any] | None, str | None]


def _each(items: Sequence[_Item], session: Session, room: Slots) -> Iterator[_Answer]:
    if is_inline():
        yield from (_try(session, item) for item in items)
    elif items[0][1].training.workers == 1:
        pool = replace(session.scorers, size=room.at_once)
        with Crew(partial(_alone, session), pool, room.accelerator) as crew:
            yield from crew.map(_in_actor, items)
    else:
        yield from _tasks(items, session, room.at_once)


def _alone(session: Session) -> Session:
    """What an actor holds: the session, for the size of its own share."""
    return session


def _in_actor(session: Session, item: _Item) -> _Answer:
    with inline():
        return _try(session, item)


def _try(session: Session, item: _Item) -> _Answer:
    """One training. The errors of a training are its own; the sweep goes on."""
    key, spec = item
    try:
        return key, train(spec, session), None
    except CurateError as e:
        return key, None, f"{type(e).__name__}: {e}"


def _tasks(items: Sequence[_Item], session: Session, at_once: int) -> Iterator[_Answer]:
    """Each training in a task that asks for nothing itself: Ray Train gets its workers' share."""

    @ray.remote(num_cpus=0, max_retries=3)
    def one(item: _Item) -> _Answer:
        return _try(session, item)

    waiting: list[ray.ObjectRef] = []
    left = list(items)
    while left or waiting:
        while left and len(waiting) < at_once:
            waiting.append(one.remote(left.pop(0)))
        (ready, *_), waiting = ray.wait(waiting, num_returns=1)
        try:
            yield ray.get(ready)
        except ray.exceptions.RayError as e:
            raise worded(e) from e


def check_outcomes(outcomes: Mapping[str, Outcome]) -> None:
    """
    Raises:
        WorkerError: no training succeeded; shows the first reason.
    """
    failed = [o.failed for o in outcomes.values() if o.failed is not None]
    if failed and len(failed) == len(outcomes):
        raise WorkerError(f"all {len(failed)} trainings of the sweep failed; the first: {failed[0]}")
