"""Waiting for a cluster to be large enough: on the suite's Ray of two CPUs, and on one whose autoscaler adds nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curate.errors import ConfigError
from curate.runtime.scaling import at_least
from tests.jobs.test_cluster import free_port


def test_what_is_there_is_not_waited_for(running):
    began = time.monotonic()
    with at_least(2, None, seconds=30.0):
        pass
    with at_least(None, None, seconds=30.0):
        pass
    assert time.monotonic() - began < 10


def test_a_cluster_that_stays_small_is_an_error_with_its_size(running):
    with pytest.raises(ConfigError, match=r"after 0 s the cluster has 2 of 64 CPUs, 0 of 8 GPUs\. Lower cluster\.cpus"):
        with at_least(64, 8, seconds=0.0):
            pass


CLIENT = """
import ray
from curate.runtime.cluster import ClusterSpec
from curate.runtime.session import session

with session(ClusterSpec(address="existing", ray_address="{address}", cpus=3, wait_seconds=90)) as found:
    print("workers", found.scorers.size, "cpus", int(ray.cluster_resources()["CPU"]))
"""


@pytest.mark.full
def test_an_autoscaler_is_asked_and_pools_have_the_grown_size(tmp_path):
    config = {
        "cluster_name": "grows",
        "max_workers": 3,
        "idle_timeout_minutes": 5,
        # Ray's own provider for tests: its nodes are processes on this machine.
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "head",
        "upscaling_speed": 1.0,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{f"{key}_commands": [] for key in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{key}_start_ray_commands": [] for key in ("head", "worker")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
    }
    (tmp_path / "cluster.json").write_text(json.dumps(config))
    port = free_port()
    where = [f"--port={port}", f"--dashboard-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    sizes = ["--num-cpus=0", "--object-store-memory=100000000", "--disable-usage-stats"]
    bin_folder = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
    }
    command = [str(bin_folder / "ray"), "start", "--head", "--block", *where, *sizes]
    with (tmp_path / "log").open("wb") as log:
        head = subprocess.Popen(
            [*command, f"--autoscaling-config={tmp_path / 'cluster.json'}"],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        code = CLIENT.format(address=f"127.0.0.1:{port}")
        end = time.monotonic() + 120
        while True:
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=180)
            if done.returncode == 0 or time.monotonic() > end or head.poll() is not None:
                break
        assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
        assert done.stdout.split()[-4:] == ["workers", "3", "cpus", "3"]
        assert "waiting for the cluster to grow" in done.stderr
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
