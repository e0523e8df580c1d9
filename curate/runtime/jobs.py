"""Ray jobs: submit, find, follow, stop. Idempotent: work that runs or has succeeded is not started again.

Work has a name; each attempt at it is a Ray job of its own, `<name>`, `<name>-2`, `<name>-3` …, so that the log of one
that failed stays. Knows no settings and no config.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import aiohttp
import requests
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from curate.errors import ConfigError, WorkerError, near

T = TypeVar("T")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_DROPS = 5  # times in a row that the connection to a log may be lost without a word of it
_REFUSALS = (ConnectionError, RuntimeError, ValueError, RayError, requests.RequestException)


@dataclass(frozen=True)
class Attempt:
    """One Ray job. Times in seconds since 1970."""

    id: str
    state: str
    command: str
    message: str
    began: float | None
    ended: float | None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.state in ENDED


def client(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server; Ray's token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH) is sent along by Ray.

    Raises:
        ConfigError: nothing answers at `address`, or it refuses the token.
    """
    try:
        return JobSubmissionClient(address)
    except _REFUSALS as e:
        raise ConfigError(
            f"no Ray job server answers at {address or 'RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265'}: {e}. Give "
            f"--address http://<head node>:8265; if it asks for a token, set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH."
        ) from None


def _ask(doing: str, act: Callable[[], T]) -> T:
    """
    Raises:
        WorkerError: the job server refuses, or has gone.
    """
    try:
        return act()
    except _REFUSALS as e:
        raise WorkerError(f"the cluster's job server cannot {doing}: {str(e).strip().splitlines()[-1]}") from None


def submissions(jobs: JobSubmissionClient) -> list[Attempt]:
    """All jobs that were submitted to the cluster, the newest last."""
    found = []
    for job in _ask("list its jobs", jobs.list_jobs):
        if job.submission_id is None:
            continue  # a driver that joined by itself
        began, ended = (None if ms is None else ms / 1000 for ms in (job.start_time, job.end_time))
        state = str(JobStatus(job.status).value)
        said = job.message or ""
        found.append(Attempt(job.submission_id, state, job.entrypoint, said, began, ended, job.metadata or {}))
    return sorted(found, key=lambda a: (a.began or 0.0, number(a.id)))


def number(name: str) -> int:
    """Which attempt an id names: 1 for that without a number."""
    m = re.search(r"-(\d{1,4})$", name)
    return int(m[1]) if m else 1


def attempts(jobs: JobSubmissionClient, work: str) -> list[Attempt]:
    """The attempts at `work`, the newest last; none if there are none."""
    mine = re.compile(re.escape(work) + r"(-\d{1,4})?")
    return sorted((a for a in submissions(jobs) if mine.fullmatch(a.id)), key=lambda a: number(a.id))


def find(jobs: JobSubmissionClient, name: str) -> list[Attempt]:
    """The attempts that `name` means: all of a work, the newest last; or one by its id (the first by `<work>-1`).

    Raises:
        ConfigError: there is no such job.
    """
    everything = submissions(jobs)
    mine = re.compile(re.escape(name) + r"-\d{1,4}")
    found = [a for a in everything if a.id == name or mine.fullmatch(a.id)]
    found = found or [a for a in everything if f"{a.id}-1" == name]
    if not found:
        hint = near(name, [a.id for a in everything]) if everything else "; it has none at all"
        raise ConfigError(f"the cluster knows no job {name!r}{hint}")
    return sorted(found, key=lambda a: number(a.id))


def submit(
    jobs: JobSubmissionClient,
    work: str,
    command: str,
    working_dir: str | None = None,
    metadata: Mapping[str, str] | None = None,
    again: bool = False,
) -> tuple[str, str]:
    """Start `command` as the next attempt at `work`, unless one runs or has succeeded.

    Args:
        again: start also where the last one succeeded: work that recurs.

    Returns:
        The attempt's id; and what was found or done, in words that begin with the state.

    Raises:
        WorkerError: the cluster refuses the job.
    """
    last = next(iter(reversed(attempts(jobs, work))), None)
    if last is not None and not last.over:
        return last.id, f"{last.state} (submitted before)"
    if last is not None and last.state == "SUCCEEDED" and not again:
        return last.id, "SUCCEEDED (submitted before; change an option or the sink, or give --again, to run again)"
    name = work if last is None else f"{work}-{number(last.id) + 1}"
    environment = {"working_dir": working_dir} if working_dir else None
    try:
        jobs.submit_job(entrypoint=command, submission_id=name, runtime_env=environment, metadata=dict(metadata or {}))
    except _REFUSALS as e:
        if any(a.id == name for a in attempts(jobs, work)):  # somebody else was quicker, by a moment
            return name, "PENDING (submitted before)"
        raise WorkerError(f"the cluster does not take the job {name}: {e}") from None
    if last is None:
        return name, "PENDING"
    if last.state == "SUCCEEDED":
        return name, f"PENDING (attempt {number(name)})"
    return name, f"PENDING (attempt {number(name)}: it had {last.state.lower()}; goes on with what is missing)"


def state(jobs: JobSubmissionClient, name: str) -> str:
    """The state of one attempt."""
    return str(_ask(f"find {name}", lambda: jobs.get_job_status(name)).value)


def log(jobs: JobSubmissionClient, name: str) -> str:
    """What an attempt has said so far."""
    return _ask(f"give the log of {name}", lambda: jobs.get_job_logs(name))


def stop(jobs: JobSubmissionClient, name: str, seconds: float = 60.0) -> str:
    """End an attempt, by SIGTERM and then by SIGKILL; its state, once it has ended.

    Raises:
        WorkerError: it has not ended after `seconds`.
    """
    _ask(f"stop {name}", lambda: jobs.stop_job(name))
    end = time.monotonic() + seconds
    while (now := state(jobs, name)) not in ENDED:
        if time.monotonic() > end:
            raise WorkerError(f"{name} is {now} {seconds:.0f} s after it was told to stop; look at the dashboard")
        time.sleep(0.5)
    return now


def follow(jobs: JobSubmissionClient, name: str) -> Iterator[str]:
    """An attempt's log as it is written, until it ends; a connection that is lost is made again.

    Raises:
        WorkerError: it is lost again and again.
    """
    seen = drops = 0
    while True:
        skip = seen  # the server begins from the beginning
        try:
            for text in _tail(jobs, name):
                new = text[skip:]
                skip = max(0, skip - len(text))
                if new:
                    seen += len(new)
                    drops = 0
                    yield new
        except (*_REFUSALS, aiohttp.ClientError) as e:
            why = str(e)
        else:
            why = "it ends, but the job does not"
            if _over(jobs, name):
                return
        drops += 1
        if drops > _DROPS:
            raise WorkerError(f"the log of {name} cannot be followed: {why}. The job itself goes on")
        time.sleep(1.0)


def _over(jobs: JobSubmissionClient, name: str) -> bool:
    try:
        return state(jobs, name) in ENDED
    except WorkerError:
        return False  # the head may be back in a moment


def _tail(jobs: JobSubmissionClient, name: str) -> Iterator[str]:
    lines = jobs.tail_job_logs(name)
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(lines.__anext__())
            except StopAsyncIteration:
                return
    finally:
        if isinstance(lines, AsyncGenerator):
            loop.run_until_complete(lines.aclose())  # and with it the connection
        loop.close()
