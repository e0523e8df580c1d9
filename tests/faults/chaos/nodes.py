"""Several Ray nodes on this machine, as processes that can be killed one by one.

In: an environment for all their workers. Out: the address of the cluster, the processes of each node, nodes that are
killed and nodes that take their place. The head holds Ray's own tables and no work, as in a real cluster; it and the
driver beside it are on the machine that stays.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

STORE_BYTES = 80 << 20
# A node that does not answer is given up after five seconds, not after fifteen: else the runs would mostly wait. After
# fewer, a busy machine would lose nodes that live.
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


@dataclass
class Nodes:
    """A head and `size` nodes with `cpus` CPUs each."""

    size: int
    cpus: int
    cluster: Any
    working: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.gcs_address)

    def add(self) -> None:
        """One more node, as an autoscaler would start it."""
        self.working.append(self.cluster.add_node(num_cpus=self.cpus, object_store_memory=STORE_BYTES))

    def fill(self) -> None:
        """Nodes in the place of those that are gone."""
        for node in list(self.working):
            if not psutil.pid_exists(raylet(node)) or psutil.Process(raylet(node)).status() == psutil.STATUS_ZOMBIE:
                self._forget(node)
        while len(self.working) < self.size:
            self.add()

    def _forget(self, node: Any) -> None:
        self.working.remove(node)
        self.cluster.worker_nodes.discard(node)

    def kill(self, node: Any, whole: bool) -> list[psutil.Process]:
        """SIGKILL a raylet, or with `whole` every process of its node; answers which ones must be gone soon."""
        pid = raylet(node)
        family = psutil.Process(pid).children(recursive=True)
        victims = [psutil.Process(pid), *(family if whole else [])]
        for victim in victims:
            kill(victim)
        for kinds in node.all_processes.values():
            for info in kinds:
                if info.process.pid == pid or whole:
                    info.process.kill()
                    info.process.wait()  # a zombie would count as alive for its workers
        self._forget(node)
        return family

    def workers(self) -> list[tuple[Any, psutil.Process, str]]:
        """(node, process, what it is doing) of every worker process that runs something."""
        out = []
        for node in self.working:
            for process in children(raylet(node)):
                title = doing(process)
                if title and not title.startswith("IDLE") and "Agent" not in title:
                    out.append((node, process, title))
        return out


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def doing(process: psutil.Process) -> str:
    """What Ray has named the process by ("MapWorker(…)", "IDLE"), or "" for one that is no worker."""
    try:
        line = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
    return line.removeprefix("ray::") if line.startswith("ray::") else ""


def kill(process: psutil.Process) -> None:
    with suppress(ProcessLookupError):  # it was quicker
        os.kill(process.pid, signal.SIGKILL)


@contextmanager
def nodes(size: int, cpus: int, environment: dict[str, str]) -> Iterator[Nodes]:
    """Start them; at the end, and if this process dies, they end."""
    os.environ.update(environment)  # what raylets, and so their workers, inherit
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "dashboard_agent_listen_port": None,  # another Ray of this machine may have the usual one
            "_system_config": QUICK,
        },
    )
    found = Nodes(size, cpus, cluster)
    try:
        found.fill()
        yield found
    finally:
        cluster.shutdown()
