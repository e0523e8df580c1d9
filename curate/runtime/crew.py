"""Crew: actors that live through several rounds of work, so that what they hold (a model, say) is loaded once.

In: a function that makes an actor's state, then rounds of (function, items). Out: answers as they come, in any order.
For one round over a corpus use `stream`, which also reads; this is for rounds that build on one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import ray
import torch

from curate import errors
from curate.errors import CurateError, WorkerError
from curate.runtime import events, metrics
from curate.runtime.inline import is_inline
from curate.runtime.leaving import let_end
from curate.runtime.lost import LOST, Life, device_errors_in_words
from curate.runtime.memory import out_of_memory_in_words
from curate.runtime.session import Pool
from curate.runtime.stream import worded

State = TypeVar("State")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


TRIES = 6  # of an item, whose actor dies each time


def _told(error: CurateError) -> tuple[str, str]:
    return type(error).__name__, str(error)


class _Member:
    """One actor. Errors travel as data: of a failing constructor Ray would only restart the actor."""

    def __init__(self, make: Callable[[], Any], scene: events.Scene) -> None:
        events.enter(scene)
        metrics.count("curate_worker_starts", 1)
        self.failed: CurateError | None = None
        self.life = Life()
        try:
            with out_of_memory_in_words():
                self.state = make()
        except CurateError as e:
            self.failed = e
        except torch.AcceleratorError as e:
            self.failed = self.life.cannot_start(e)

    def work(
        self, act: Callable[[Any, Any], Any], item: Any, scene: events.Scene
    ) -> tuple[Any, tuple[str, str] | None]:
        events.enter(scene)
        if self.failed is not None:
            return None, _told(self.failed)
        try:
            with out_of_memory_in_words():
                answer = act(self.state, item)
            self.life.answered = True
            return answer, None
        except LOST as e:
            return None, _told(self.life.end(e))
        except CurateError as e:
            return None, _told(e)
        finally:
            metrics.flush()

    @ray.method(max_task_retries=-1)
    def ready(self) -> None:
        """Answers once the actor runs, or runs again."""


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

        When an error ends the round, or it is left early, the others at work get a set time to end their items.

        Raises:
            CurateError: raised in an actor; the first one ends the round.
            WorkerError: actors died more often than they are replaced, or ran out of their device's memory.
        """
        if is_inline():
            for item in items:
                with device_errors_in_words():
                    self._here = self._make() if self._here is None else self._here
                    answer = act(self._here, item)
                yield answer
            return
        self._grow(len(items))
        idle = list(self._members)
        at = 0
        tries = [0] * len(items)
        running: dict[Any, tuple[Any, int]] = {}  # (member, item) by what to wait for; likewise:
        # Members that have died, or whose node has, and may come again; without an item where it has had its tries.
        away: dict[Any, tuple[Any, int | None]] = {}
        try:
            while at < len(items) or running or any(n is not None for _, n in away.values()):
                while idle and at < len(items):
                    member = idle.pop()
                    running[self._give(member, act, items[at])] = member, at
                    at += 1
                (done, *_), _ = ray.wait([*running, *away], num_returns=1)
                if done in away:
                    member, waits = away.pop(done)
                    try:
                        ray.get(done)
                    except ray.exceptions.RayActorError:
                        member = self._replaced(member)
                    if waits is None:
                        idle.append(member)
                    else:
                        running[self._give(member, act, items[waits])] = member, waits
                    continue
                member, n = running.pop(done)
                tries[n] += 1
                try:
                    answer, error = ray.get(done)
                    idle.append(member)
                except ray.exceptions.RayError as e:
                    # Ray's own repeats would be used up while it has not noticed that a node is gone.
                    comes_again = isinstance(e, ray.exceptions.ActorUnavailableError)
                    if comes_again and tries[n] < TRIES:
                        away[member.ready.remote()] = member, n
                        continue
                    said = worded(e)
                    if lost is None or not isinstance(said, WorkerError):
                        raise
                    if comes_again:
                        away[member.ready.remote()] = member, None
                    else:
                        idle.append(self._replaced(member))
                    answer, error = lost(items[n], said), None
                if error is not None:
                    metrics.error(error[0])
                    raise getattr(errors, error[0], CurateError)(error[1])
                yield answer
        except (Exception, GeneratorExit) as e:  # not an interrupt: who sends one does not want to wait
            if ray.is_initialized():
                let_end([*running])
            if isinstance(e, ray.exceptions.RayError):
                raise worded(e) from e
            raise

    @staticmethod
    def _give(member: Any, act: Callable[[State, Item], Answer], item: Item) -> Any:
        return member.work.remote(act, item, events.scene())

    def _replaced(self, member: Any) -> Any:
        """A new one in the place of `member`, which Ray has started again as often as it may."""
        ray.kill(member)  # of one that ran out of memory Ray starts another, which would take the new one's share
        self._members.remove(member)
        self._grow(len(self._members) + 1)
        return self._members[-1]

    def _grow(self, items: int) -> None:
        member = ray.remote(_Member)
        for _ in range(len(self._members), min(self._pool.size, items)):
            options: dict[str, Any] = {"num_cpus": self._pool.cpus, "num_gpus": self._pool.gpus or None}
            if self._accelerator is not None:
                options["accelerator_type"] = self._accelerator
            options |= {"max_restarts": self._pool.restarts, "max_task_retries": 0}
            self._members.append(member.options(**options).remote(self._make, events.scene()))

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
