"""Streaming of work items through Ray Data: CPU tasks that read, then a fixed actor pool that scores and commits.

In: items, a reader function, a function that makes a worker. Out: one small answer for each chunk that a reader yields,
as they finish. Every chunk is a block of its own, so that it is one actor's call as soon as it is read.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np
import ray
import torch

from curate import errors
from curate.errors import CurateError, WorkerError
from curate.runtime import events, metrics
from curate.runtime.inline import Held, is_inline, run_inline
from curate.runtime.leaving import let_end
from curate.runtime.lost import LOST, Life
from curate.runtime.memory import out_of_memory_in_words
from curate.runtime.session import Pool, Readers

READS = 4096
"""Tasks that read, at most, of a stream: one for each item took half as long again and as much memory of the driver."""
_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
)


def _row(item: bytes = b"", error: CurateError | None = None) -> dict[str, np.ndarray]:
    """A block of one row. Errors travel as data: of an exception raised in Ray Data only the text arrives."""
    value = np.empty(1, dtype=object)
    value[0] = item
    return {"item": value, "error": np.array(["" if error is None else json.dumps([type(error).__name__, str(error)])])}


def _reading(read: Callable[[bytes], Iterator[bytes]], scene: events.Scene) -> Callable:
    def step(batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        events.enter(scene)
        try:
            for chunk in read(batch["item"][0]):
                yield _row(chunk)
        except CurateError as e:
            yield _row(error=e)
        metrics.flush()

    return step


class _Stage:
    """Calls the worker with one item's bytes and returns its answer."""

    def __init__(self, make: Callable[[], Callable[[bytes], bytes]], scene: events.Scene) -> None:
        events.enter(scene)
        metrics.count("curate_worker_starts", 1)
        self.failed: CurateError | None = None
        self.life = Life()
        try:
            with out_of_memory_in_words():
                self.work = make()
        except CurateError as e:  # said with the first item; raised here it would only restart the actor
            self.failed = e
        except torch.AcceleratorError as e:
            self.failed = self.life.cannot_start(e)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if batch["error"][0]:
            return batch
        if self.failed is not None:
            return _row(error=self.failed)
        try:
            with out_of_memory_in_words():
                answer = _row(self.work(batch["item"][0]))
            self.life.answered = True
            return answer
        except LOST as e:
            return _row(error=self.life.end(e))
        except CurateError as e:
            return _row(error=e)
        finally:
            metrics.flush()


class _Actors:
    """Those of one stream. They have names, by which they are found when it ends early."""

    def __init__(self) -> None:
        self._prefix, self._numbers = f"stream-{secrets.token_hex(8)}", count()
        self._names: list[str] = []
        self._known: dict[str, Any] = {}
        self._leaving: dict[ray.ObjectRef, Any] = {}

    def name(self) -> dict[str, str]:
        self._names.append(f"{self._prefix}-{next(self._numbers)}")
        return {"name": self._names[-1]}

    def know(self) -> None:
        """Get hold of those that have started since: of an error of its own Ray Data tells when it has let them go, and
        their names with them, though they still work."""
        for name in self._names:
            if name not in self._known:
                with suppress(ValueError):  # not yet, or it has ended
                    self._known[name] = ray.get_actor(name)

    def dismiss(self) -> None:
        """Have each leave when it has answered what it was given."""
        if not ray.is_initialized():  # a stream that is left after its session; asking would start another Ray
            return
        with suppress(ray.exceptions.RayError):  # a cluster that is gone itself; what ended the stream is to be told
            self.know()
            for actor in self._known.values():
                self._leaving[actor.__ray_terminate__.options(max_task_retries=0).remote()] = actor

    def wait(self) -> None:
        """Until those that were dismissed are gone, for a set time, and kill the others."""
        for ref in let_end([*self._leaving]):
            ray.kill(self._leaving[ref])


def _raise(told: str) -> None:
    name, message = json.loads(told)
    metrics.error(name)
    raise getattr(errors, name, CurateError)(message)


def worded(error: ray.exceptions.RayError) -> BaseException:
    """What to raise for an error of Ray: the user-facing one within it; a death of workers in words; else itself."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, CurateError):
        return inner
    if isinstance(error, _DEATHS):
        first = str(error).strip().splitlines()[0]
        return WorkerError(
            f"a worker died again and again, so the job was ended ({first}). The usual cause is too little memory: "
            f"lower cluster.token_budget, cluster.gradient_token_budget or cluster.workers. Workers' logs lie below "
            f"/tmp/ray/session_latest/logs, or set CURATE_WORKER_LOGS=1. What was committed stays; the same command "
            f"goes on from there."
        )
    return error


def stream(
    items: Sequence[bytes],
    make_worker: Callable[[], Callable[[bytes], bytes]],
    pool: Pool,
    read: Callable[[bytes], Iterator[bytes]] | None = None,
    readers: Readers | None = None,
    chunks: int = 0,
) -> Iterator[bytes]:
    """Stream `items` through readers and the pool; yields each worker's answer as it comes, in any order.

    `chunks` is how many the items give when read, if more than one each: no more actors than that are started.
    `make_worker` runs once in each actor's constructor (and again in one that replaces it). When an error ends the
    stream, or it is closed, workers end what they were given first; afterwards none of them is at work.

    Raises:
        CurateError: raised in a reader or a worker; the first one ends the stream.
        WorkerError: workers died more often than they are replaced, or ran out of their device's memory.
    """
    if is_inline():
        yield from run_inline(items, make_worker, read)
        return
    if not items:
        return
    actors = _Actors()
    answers = _streamed(items, make_worker, pool, read, readers, chunks, actors)
    try:
        for answer in answers:
            if answer["error"]:
                _raise(answer["error"])
            yield answer["item"]
    except (Exception, GeneratorExit) as e:  # not an interrupt: who sends one does not want to wait
        actors.dismiss()
        answers.close()  # or Ray Data would give work to those that are left
        actors.wait()
        if isinstance(e, ray.exceptions.RayError):
            raise worded(e) from e
        raise


def _streamed(
    items: Sequence[bytes],
    make_worker: Callable[[], Callable[[bytes], bytes]],
    pool: Pool,
    read: Callable[[bytes], Iterator[bytes]] | None,
    readers: Readers | None,
    chunks: int,
    actors: _Actors,
) -> Generator[dict[str, Any]]:
    """The rows of `_row`, one for each answer."""
    size = min(pool.size, max(len(items), chunks))
    blocks = len(items) if read is None else min(len(items), READS)
    data: ray.data.Dataset = ray.data.from_items([{"item": i, "error": ""} for i in items], override_num_blocks=blocks)
    # Else Ray gathers what a reader yields up to 128 MiB, and one actor gets a whole unit of many chunks in one call.
    data.context.target_max_block_size = 1
    if read is not None:
        readers = readers or Readers(1, 0.25)
        data = data.map_batches(
            _reading(read, events.scene()), batch_size=1, num_cpus=readers.cpus, concurrency=readers.size
        )
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to bound the retries, which are endless by default, or to name the actors, and it
        # warns that the next one may have another.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        data = data.map_batches(
            _Stage,
            fn_constructor_args=(make_worker, events.scene()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            ray_remote_args_fn=actors.name,
            max_restarts=pool.restarts,
            # Not bounded too: until Ray has noticed that a node is gone, every attempt to reach it counts as one.
            max_task_retries=-1,
        )
    # Not iter_rows: it holds an answer, or an error, back until the next one has come; nor iter_batches, each call of
    # which leaves a thread behind.
    for bundle in data.iter_internal_ref_bundles():
        actors.know()
        for entry in bundle.blocks:
            (row,) = ray.get(entry.ref).to_pylist()
            yield row


def put(value: Any) -> ray.ObjectRef | Held:
    """Place a large value in the object store once; actors fetch it with `fetch` in their constructors."""
    return Held(value) if is_inline() else ray.put(value)


def fetch(ref: ray.ObjectRef | Held) -> Any:
    """The value of `put`; NumPy buffers are shared within a node."""
    return ref.value if isinstance(ref, Held) else ray.get(ref)


def map_tasks(fn: Callable[[Any], Any], items: Sequence[Any], cpus: float = 0.5) -> Iterator[Any]:
    """Run `fn` over `items` as Ray tasks, a bounded number at a time; yields results in the order of `items`."""
    if is_inline():
        yield from map(fn, items)
        return

    scene = events.scene()

    @ray.remote(num_cpus=cpus, max_retries=3)
    def call(item: Any) -> Any:
        events.enter(scene)
        try:
            return fn(item)
        finally:
            metrics.flush()

    limit = max(4, int(2 * ray.cluster_resources().get("CPU", 1) / cpus))
    waiting: list[ray.ObjectRef] = []
    at = 0
    try:
        while at < len(items) or waiting:
            while at < len(items) and len(waiting) < limit:
                waiting.append(call.remote(items[at]))
                at += 1
            yield ray.get(waiting.pop(0))
    except (Exception, GeneratorExit) as e:
        for ref in let_end(waiting):
            ray.cancel(ref, force=True)
        if isinstance(e, ray.exceptions.RayError):
            raise worded(e) from e
        raise
