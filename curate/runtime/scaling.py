"""Waits until a cluster that was joined is as large as a job needs, and asks its autoscaler for the rest.

In: numbers of CPUs and GPUs. Out: nothing, or an error after a set time. Pools of actors are fixed when a job starts
(session.py), so a cluster that grows only when work waits would give it the pools of its smallest size. It knows no
provider: Ray's autoscaler, KubeRay's, or a scheduler whose nodes join one by one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.autoscaler.sdk import request_resources

from curate.errors import ConfigError
from curate.runtime.events import say

LOOK_SECONDS = 1.0


@contextmanager
def at_least(cpus: int | None, gpus: int | None, seconds: float) -> Iterator[None]:
    """Within the block the cluster has had `cpus` CPUs and `gpus` GPUs (None: whatever it has) at its beginning.

    The request holds until the end of the block; a cluster keeps one request, that of the job that asked last.

    Raises:
        ConfigError: it was smaller than that for `seconds`.
    """
    wanted = {name: float(n) for name, n in (("CPU", cpus), ("GPU", gpus)) if n}
    if not wanted:
        yield
        return
    request_resources(num_cpus=cpus, bundles=[{"GPU": 1.0}] * (gpus or 0))
    try:
        _wait(wanted, seconds)
        yield
    finally:
        request_resources(num_cpus=0, bundles=[])


def _wait(wanted: dict[str, float], seconds: float) -> None:
    end = time.monotonic() + seconds
    said = False
    while True:
        have = ray.cluster_resources()
        short = {name: have.get(name, 0.0) for name, n in wanted.items() if have.get(name, 0.0) < n}
        if not short:
            return
        if time.monotonic() >= end:
            least = ", ".join(f"{have:g} of {wanted[name]:g} {name}s" for name, have in short.items())
            raise ConfigError(
                f"after {seconds:g} s the cluster has {least}. Lower cluster.cpus or cluster.gpus, raise the largest "
                f"size of its worker groups, or give it more time by cluster.wait_seconds."
            )
        if not said:
            said = True
            say("waiting for the cluster to grow", **{f"{name}s": f"{n:g}" for name, n in wanted.items()})
        time.sleep(LOOK_SECONDS)
