"""Ray sessions: start an embedded Ray or join a cluster, and size its pools. The only place that calls ray.init."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch

from curate.errors import ConfigError, WorkerError
from curate.runtime import metrics
from curate.runtime.cluster import ClusterSpec
from curate.runtime.inline import inline
from curate.runtime.scaling import at_least

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """A fixed pool of `size` actors, each with its share of the machine. `restarts`: how often one is replaced, bounded
    so that a deadly row ends the job."""

    size: int
    cpus: float
    gpus: float
    restarts: int = 10


@dataclass(frozen=True)
class Readers:
    """Tasks that read and tokenise: at most `size` at a time, with `cpus` each."""

    size: int
    cpus: float


@dataclass(frozen=True)
class Session:
    """What the running cluster offers, as pools. Padded tokens of a batch: `token_budget` of a forward pass,
    `gradient_token_budget` where gradients are taken. `peak_tflops`: what a worker's device can do, None: measure."""

    scorers: Pool
    engines: Pool
    readers: Readers
    token_budget: int
    gradient_token_budget: int
    hosts: int
    peak_tflops: float | None = None


@contextmanager
def _hushed() -> Iterator[None]:
    """Ray's native log off the terminal, where it would stand between the lines of progress; its files have it all.

    Ray announces the level itself on stderr, so that is held back while it starts, and shown if it fails to.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(shown, held.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _joins(spec: ClusterSpec) -> bool:
    """Is there a cluster to join, or is Ray started here?"""
    return spec.address == "existing" or bool(os.environ.get("RAY_ADDRESS"))


def _start(spec: ClusterSpec) -> None:
    # A Ray that is embedded here must not report usage or start a dashboard nobody asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": bool(os.environ.get("CURATE_WORKER_LOGS")),
    }
    if _joins(spec):
        address = spec.ray_address if spec.address == "existing" else os.environ["RAY_ADDRESS"]
        try:
            with _hushed():
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise ConfigError(
                f"no Ray cluster answers at cluster.ray_address={address!r} ({e}). Start one with "
                f"`ray start --head`, give its address, or use cluster=local."
            ) from e
        return
    memory: dict[str, Any] = {"object_store_memory": int(spec.object_store_gb * 2**30)} if spec.object_store_gb else {}
    try:
        with _hushed():
            ray.init(
                address="local", num_cpus=spec.cpus, num_gpus=spec.gpus, include_dashboard=False, **quiet, **memory
            )
    except Exception as e:  # Ray has no class for it
        if "timed out during startup" not in str(e):
            raise
        load, cores = psutil.getloadavg()[0], psutil.cpu_count()
        raise WorkerError(
            f"Ray did not start on this machine within its 30 seconds (load {load:.1f} on {cores} cores). Nothing was "
            f"begun: run the same command when the machine is less busy, or join a cluster that runs already with "
            f"cluster=existing."
        ) from e


def _session(spec: ClusterSpec) -> Session:
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 1.0), have.get("GPU", 0.0)
    per_gpu = spec.gpus_per_worker if spec.gpus_per_worker is not None else (1.0 if gpus else 0.0)
    size = spec.workers or max(1, int(gpus // per_gpu if per_gpu else cpus // max(spec.cpus_per_worker, 1e-9)))
    scorers = Pool(size, spec.cpus_per_worker, per_gpu)
    engine_gpus = spec.engine_gpus if spec.engine_gpus is not None else per_gpu
    engine_cpus = spec.engine_cpus if spec.engine_cpus is not None else (1.0 if engine_gpus else max(1.0, cpus - 1))
    engines = Pool(spec.engine_workers or (size if engine_gpus else 1), engine_cpus, engine_gpus)
    for what, pool in (("workers", scorers), ("engine_workers", engines)):
        if pool.size * pool.gpus > gpus or pool.size * pool.cpus > cpus:
            raise ConfigError(
                f"cluster.{what}={pool.size} with {pool.cpus:g} CPUs and {pool.gpus:g} GPUs each does not fit the "
                f"cluster's {cpus:g} CPUs and {gpus:g} GPUs; lower it, or the CPUs and GPUs per actor"
            )
    budgets = _budgets(spec, per_gpu)
    # Readers and scorers share the CPUs; a pool that takes all of them leaves readers none and the stream stands still.
    free = cpus - scorers.size * scorers.cpus
    if free < spec.reader_cpus:
        share = max((cpus - spec.reader_cpus) / scorers.size, 0.01)
        scorers = Pool(scorers.size, round(share - 0.005, 2), scorers.gpus)
    hosts = len({n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]})
    # A reader keeps several GPUs busy; on CPUs it would take from the scorers what it gives them.
    readers = Readers(spec.readers or max(1, size if gpus else size // 2), spec.reader_cpus)
    return Session(scorers, engines, readers, *budgets, hosts, spec.peak_tflops)


def _here(spec: ClusterSpec) -> Session:
    """This process as a pool of one."""
    gpus = float(torch.cuda.device_count() > 0)
    pool = Pool(1, float(spec.cpus or psutil.cpu_count(logical=False) or 1), gpus)
    return Session(pool, pool, Readers(1, 0.0), *_budgets(spec, gpus), 1, spec.peak_tflops)


def _budgets(spec: ClusterSpec, gpus: float) -> tuple[int, int]:
    """Padded tokens of a batch, forward and with gradients. A backward pass keeps what every block computes within,
    about 34 bytes × width a token and block in bfloat16: 4.5 MB a token for 32 blocks of the width 4,096. A forward
    pass keeps the layers that are read, 8 kB each."""
    forward = spec.token_budget or (65536 if gpus else 1024)
    return forward, spec.gradient_token_budget or (max(1, forward // 8) if gpus else forward)


@contextmanager
def session(spec: ClusterSpec) -> Iterator[Session]:
    """Start or join Ray (or neither, inline) for the length of the block; leaves a Ray alone that the caller started.

    Raises:
        ConfigError: no cluster answers, it stays too small, or the configured pool does not fit it.
    """
    if spec.address == "inline":
        with inline():
            yield _here(spec)
        return
    mine = not ray.is_initialized()
    if mine:
        _start(spec)
        metrics.renew()
    try:
        data = ray.data.DataContext.get_current()
        data.enable_progress_bars = False
        data.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what is wrong arrives as an exception as well
        with at_least(spec.cpus, spec.gpus, spec.wait_seconds) if mine and _joins(spec) else nullcontext():
            yield _session(spec)
    finally:
        if mine:
            ray.shutdown()
