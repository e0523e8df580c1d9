"""Ray jobs: submit, find, follow. Idempotent: an id that runs or has succeeded is not started again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from curate.errors import ConfigError, WorkerError


def client(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server; Ray's token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH) is sent along by Ray.

    Raises:
        ConfigError: nothing answers at `address`, or it refuses the token.
    """
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as e:
        raise ConfigError(
            f"no Ray job server answers at {address or 'RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265'}: {e}. Give "
            f"--address http://<head node>:8265; if it asks for a token, set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH."
        ) from None


def state(jobs: JobSubmissionClient, name: str) -> str | None:
    """The state of a job by its id, or None when there is no such job."""
    for job in jobs.list_jobs():
        if job.submission_id == name:
            return str(JobStatus(job.status).value)
    return None


def submit(jobs: JobSubmissionClient, name: str, command: str, working_dir: str | None) -> str:
    """Start `command` under the id `name`, unless it runs or has succeeded; one that failed or was stopped goes on.

    Returns what was found or done, in words that begin with the state.

    Raises:
        WorkerError: the cluster refuses the job.
    """
    found = state(jobs, name)
    if found in ("PENDING", "RUNNING"):
        return f"{found} (submitted before)"
    if found == "SUCCEEDED":
        return "SUCCEEDED (submitted before; change an option or the sink to run again)"
    if found is not None:
        jobs.delete_job(name)
    environment = {"working_dir": working_dir} if working_dir else None
    try:
        jobs.submit_job(entrypoint=command, submission_id=name, runtime_env=environment)
    except RuntimeError as e:
        raise WorkerError(f"the cluster does not take the job {name}: {e}") from None
    return "PENDING" if found is None else f"PENDING (it had {found.lower()}; goes on with what is missing)"


def follow(jobs: JobSubmissionClient, name: str) -> Iterator[str]:
    """The job's log as it is written, until it ends."""
    lines = jobs.tail_job_logs(name)
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(lines.__anext__())
            except StopAsyncIteration:
                return
    finally:
        loop.close()
