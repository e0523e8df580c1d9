"""Crew: actors that live through several rounds of work, so that what they hold (a model, say) is loaded once.

In: a function that makes an actor's state, then rounds of (function, items). Out: answers as they come, in any order.
For one round over a corpus use `stream`, which also reads; this is for rounds that build on one another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import ray
import torch

from curate import errors
from curate.errors import CurateError, WorkerError
from curate.runtime import events, metrics
from curate.runtime.inline import is_inline
from curate.runtime.memory import out_of_memory_in_words
from curate.runtime.session import Pool
from curate.runtime.stream import DEAD_DEVICE_EXIT, worded

State = TypeVar("State")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Member:
    """One actor. Errors travel as data: of a failing constructor Ray would only restart the actor."""

    def __init__(self, make: Callable[[], Any], scene: events.Scene) -> None:
        events.enter(scene)
        metrics.count("curate_worker_starts", 1)
        self.failed: CurateError | None = None
        try:
            with out_of_memory_in_words():
                self.state = make()
        except CurateError as e:
            self.failed = e

    def work(
        self, act: Callable[[Any, Any], Any], item: Any, scene: events.Scene
    ) -> tuple[Any, tuple[str, str] | None]:
        events.enter(scene)
        if self.failed is not None:
            return None, (type(self.failed).__name__, str(self.failed))
        try:
            with out_of_memory_in_words():
                return act(self.state, item), None
        except CurateError as e:
            return None, (type(e).__name__, str(e))
        except torch.AcceleratorError:
            os._exit(DEAD_DEVICE_EXIT)  # the device is lost: be replaced on a sound one, not retried here
        finally:
            metrics.flush()


class Crew:
    """At most `pool.size` actors, each with a state made by `make` in its constructor (and again in one that replaces
    it). They start with the first round; use as a context, or call `close`. `accelerator`: the kind of GPU that they
    must have (Ray's name)."""

    def __init__(self, make: Callable[[], State], pool: Pool, accelerator: str | None = None) -> None:
        self._make, self._pool, self._accelerator = make, pool, accelerator
        self._members: list[Any] = []
        self._here: Any = None  # the one state of an inline run

    def map(
        self,
        act: Callable[[State, Item], Answer],
        items: Sequence[Item],
        lost: Callable[[Item, WorkerError], Answer] | None = None,
    ) -> Iterator[Answer]:
        """`act(state, item)` for every item, begun in the order of `items` (put the largest first); an item whose
        actor dies is done again by the one that replaces it.

        Args:
            lost: the answer for an item whose actors died again and again; None: such an item ends the round.

        Raises:
            CurateError: raised in an actor; the first one ends the round.
            WorkerError: actors died more often than they are replaced, or ran out of their device's memory.
        """
        if is_inline():
            for item in items:
                with out_of_memory_in_words():
                    self._here = self._make() if self._here is None else self._here
                    answer = act(self._here, item)
                yield answer
            return
        self._grow(len(items))
        idle = list(self._members)
        at = 0
        running: dict[Any, tuple[Any, Item]] = {}
        try:
            while at < len(items) or running:
                while idle and at < len(items):
                    member = idle.pop()
                    running[member.work.remote(act, items[at], events.scene())] = member, items[at]
                    at += 1
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                member, item = running.pop(done)
                idle.append(member)
                try:
                    answer, error = ray.get(done)
                except ray.exceptions.RayError as e:
                    said = worded(e)
                    if lost is None or not isinstance(said, WorkerError):
                        raise
                    answer, error = lost(item, said), None
                if error is not None:
                    metrics.error(error[0])
                    raise getattr(errors, error[0], CurateError)(error[1])
                yield answer
        except ray.exceptions.RayError as e:
            raise worded(e) from e

    def _grow(self, items: int) -> None:
        member = ray.remote(_Member)
        for _ in range(len(self._members), min(self._pool.size, items)):
            options: dict[str, Any] = {"num_cpus": self._pool.cpus, "num_gpus": self._pool.gpus or None}
            if self._accelerator is not None:
                options["accelerator_type"] = self._accelerator
            self._members.append(member.options(**options, **self._pool.retries()).remote(self._make, events.scene()))

    def close(self) -> None:
        """End the actors, so that their share of the machine is free for the next stage. Inline, a state that has a
        `close` is closed: nothing else ends with this process's only actor."""
        for member in self._members:
            ray.kill(member)
        if (end := getattr(self._here, "close", None)) is not None:
            end()
        self._members, self._here = [], None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
