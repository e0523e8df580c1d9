"""SIGKILL in the middle of a sweep: the same command trains what is missing and finds what an undisturbed one does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.test_kill import assert_all_gone, family
from tests.jobs.helpers import command, inline, run_job
from tests.jobs.sweeping import planted, table, trained

pytestmark = pytest.mark.slow


def wait_for_trainings(store: Path, n: int, process, seconds: float = 300) -> None:
    """Until `n` trainings are done; polls, as there is nothing else to wait on from outside."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(trained(store)) >= n:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"only {len(trained(store))} trainings after {seconds} s")


def test_the_driver_is_killed_halfway(tmp_path, model):
    more = {"sweep.seeds": "[0,1]", "sweep.random": 0}
    on_ray = {"cluster.cpus": 2, "cluster.workers": 2, "cluster.object_store_gb": 0.2}
    overrides = planted(tmp_path, model, **more, **on_ray)
    process = command("retrain", overrides)
    wait_for_trainings(tmp_path / "store", 2, process)
    relatives = family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert_all_gone(relatives)
    before = trained(tmp_path / "store")
    assert 2 <= len(before) < 6, "the kill came too late to test anything"

    again = command("retrain", overrides)
    _, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert f"trainings_done={len(before)} trainings_left={6 - len(before)}" in err
    after = trained(tmp_path / "store")
    assert len(after) == 6
    assert all(after[name] == stamp for name, stamp in before.items())
    assert not list((tmp_path / "store").rglob("*.tmp"))

    apart = {"sink.store": tmp_path / "undisturbed"}
    run_job("retrain", inline(planted(tmp_path, model, sink="alone", **more, **apart)))
    found, want = table(tmp_path / "out"), table(tmp_path / "alone")
    assert found.keys() == want.keys()
    assert found == pytest.approx(want, abs=1e-4)
