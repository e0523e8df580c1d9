"""The trainings of a sweep: those that are missing are run, as many at once as the cluster holds.

In: one TrainSpec a training. Out: for each what its done.json holds, or why there is none. Each training is recorded in
the store as it ends, so a killed sweep goes on with what is missing; one that fails is told of and the others go on.
Knows no score, no arm and no evaluator.

A training of one process runs in an actor that lives through the whole sweep: its imports, seconds of a small training
that takes not many more, are paid once. One of several processes gets Ray Train's own workers, in a task that waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray

from curate.errors import CurateError, WorkerError
from curate.runtime import events
from curate.runtime.accelerators import places
from curate.runtime.crew import Crew
from curate.runtime.events import say
from curate.runtime.inline import inline, is_inline
from curate.runtime.progress import Progress
from curate.runtime.session import Session
from curate.runtime.stream import worded
from curate.runtime.train import DONE, TrainSpec, Watch, finished, train
from curate.training.log import share_of_peak


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
    kinds = places(pool)
    if not kinds:
        return Slots(max(1, min(at_once or pool.size, pool.size // workers)))
    kind, fit = min(kinds.items(), key=lambda k: (-k[1], k[0]))
    fit = min(fit, pool.size)  # cluster.workers counts here too; an actor that does not fit would never start
    if len(kinds) > 1:
        others = ", ".join(sorted(set(kinds) - {kind}))
        say(f"sweep: all trainings run on {kind}; left idle: {others}")
    return Slots(max(1, min(at_once or fit, fit // workers)), kind)


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
    progress.note.places, progress.note.marker = {key: spec.url for key, spec in specs.items()}, DONE

    def under_way() -> dict[str, str]:
        # They are begun in this order, so that the first which have not ended are those that run.
        return {key: specs[key].url for key in [k for k in todo if k not in out][: room.at_once]}

    items = [(key, replace(specs[key], accelerator=room.accelerator)) for key in todo]
    with Watch(under_way, _say_lines):
        for key, done, failed in _each(items, session, room):
            out[key] = Outcome(done, failed, now=True)
            progress.add(1, *((done["tokens"], 0, done["flops"], done["seconds"], done["peak"]) if done else ()))
            _say_end(key, done, failed, f"{progress.rows}/{progress.total}")
    progress.close()
    return {key: out[key] for key in specs}


def _say_lines(lines: Mapping[str, Mapping[str, Any]]) -> None:
    """How far the trainings are that run now, in one line: a long one is not to be silent until it ends."""
    step, of = (sum(line[name] for line in lines.values()) for name in ("step", "of"))
    rate = sum(line["tokens"] / max(line["seconds"], 1e-9) for line in lines.values())
    shares = share_of_peak(lines.values())
    say(f"sweep: {len(lines)} under way, {step:,}/{of:,} of their steps", rate=f"{rate:.0f} tokens/s", **shares)


def _say_end(key: str, done: Mapping[str, Any] | None, failed: str | None, count: str) -> None:
    if done is None:
        say(f"WARNING: the training {key} failed: {failed}")
        return
    say(
        f"sweep: trained {key}",
        rows=done["rows"],
        steps=done["steps"],
        loss=f"{done['first_loss']:.3f}→{done['final_loss']:.3f}",
        seconds=f"{done['seconds']:.1f}",
        done=count,
    )


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
            yield from crew.map(_in_actor, items, _lost)
    else:
        yield from _tasks(items, session, room.at_once)


def _alone(session: Session) -> Session:
    """What an actor holds: the session, for the size of its own share."""
    return session


def _in_actor(session: Session, item: _Item) -> _Answer:
    with inline():
        return _try(session, item)


def _lost(item: _Item, error: WorkerError) -> _Answer:
    """Of a training whose processes died again and again: no reason to end the others."""
    return (
        item[0],
        None,
        f"{type(error).__name__}: its process died again and again. The usual cause is too little memory: lower "
        f"training.micro_batch, source.max_tokens or sweep.at_once, or set training.gradient_checkpointing=true. "
        f"Workers' logs lie below /tmp/ray/session_latest/logs",
    )


def _try(session: Session, item: _Item) -> _Answer:
    """One training. The errors of a training are its own; the sweep goes on."""
    key, spec = item
    try:
        return key, train(spec, session), None
    except CurateError as e:
        return key, None, f"{type(e).__name__}: {e}"


def _tasks(items: Sequence[_Item], session: Session, at_once: int) -> Iterator[_Answer]:
    """Each training in a task that asks for nothing itself: Ray Train gets its workers' share."""

    scene = events.scene()

    @ray.remote(num_cpus=0, max_retries=3)
    def one(item: _Item) -> _Answer:
        events.enter(scene)
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
