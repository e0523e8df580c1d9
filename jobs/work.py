"""What a piece of work is called: one name for all attempts at it, in logs, in `curate status` and as a Ray job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import Settings

_NOT_NOTED = ("plan",)  # writes no product


def work_name(job: str, config: Settings) -> str:
    """Made of the job and its settings, whatever order they were given in. The cluster it runs on does not matter."""
    body = asdict(config)
    body.pop("cluster")
    digest = hashlib.blake2b(json.dumps([job, body], sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    return f"curate-{job}-{digest}"


def at_work(job: str | None, config: Settings) -> AbstractContextManager[None]:
    """Lines of the block's logs, and of workers that begin within it, name this work. None: of no job."""
    from curate.runtime.events import run_of

    return nullcontext() if job is None else run_of(work_name(job, config), job)


@contextmanager
def noted_work(job: str | None, config: Settings) -> Iterator[None]:
    """`curate status` sees the block as a run of this work."""
    from curate.runtime.run_note import noted

    if job is None or job in _NOT_NOTED or config.plan:
        yield
        return
    facts = {"store": config.sink.store, "scores": config.sink.scores, "max_rows": config.source.max_rows}
    with noted(config.sink.url, job, work_name(job, config), facts):
        yield
