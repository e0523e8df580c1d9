"""SIGKILL of an actor and then of the driver in the middle of a fit: the next run goes on, and nothing counts twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from curate.curvature.files import load_index
from tests.conftest import write_jsonl
from tests.faults.test_kill import assert_all_gone, family
from tests.jobs.helpers import command, options, run_job
from tests.runtime.fitting import assert_equal, solutions, varied

ROWS, SHARD = 300, 6
pytestmark = pytest.mark.slow


def wait_for(folder: Path, n: int, process, seconds: float = 240) -> list[Path]:
    """Until `n` shards are summed; polls, as there is nothing else to wait on from outside."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = list(folder.rglob("covariance/*.safetensors")) if folder.exists() else []
        if len(found) >= n:
            return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError(f"only {len(found)} shards after {seconds} s")


def test_killed_actors_and_a_killed_driver(model, tmp_path, capsys):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [varied(i) for i in range(ROWS)])
    write_jsonl(tmp_path / "q.jsonl", [{"prompt": "is it?", "response": "yes it is"}])
    more = {
        "scorer": "[influence_function]",
        "query": "file",
        "query.path": tmp_path / "q.jsonl",
        "curvature.shard_rows": SHARD,
        "source.columns.label": None,
        "source.columns.group": None,
        "source.positive_label": None,
    }
    inline = {"cluster": "inline", "cluster.cpus": 1, "cluster.workers": None}

    def given(store: str, **extra: object) -> list[str]:
        return options(
            tmp_path / "corpus", model, tmp_path / "out", **{**more, "sink.store": tmp_path / store, **extra}
        )

    workers = {"cluster.cpus": 2, "cluster.workers": 2, "cluster.object_store_gb": 0.2}
    process = command("fit", given("killed", **workers))
    factors = tmp_path / "killed" / "factors"
    wait_for(factors, 3, process)
    (victim, *_) = [p for p in family(process.pid) if any("_Member" in part for part in p.cmdline())]
    victim.kill()
    wait_for(factors, 12, process)  # by the other one, and by what replaces the dead one
    relatives = family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    process.stderr.close()
    assert_all_gone(relatives)
    done = len(wait_for(factors, 12, process=None))
    assert done < ROWS // SHARD, "the kill came too late to test anything"

    run_job("fit", given("killed", **inline))
    assert (
        f"fit: covariance: resuming rows_done={done * SHARD} rows_left={ROWS - done * SHARD}" in capsys.readouterr().err
    )
    run_job("fit", given("whole", **{**inline, "curvature.shard_rows": ROWS}))
    (one,), (other,) = factors.iterdir(), (tmp_path / "whole" / "factors").iterdir()
    index = load_index(str(one))
    assert index.rows == load_index(str(other)).rows == ROWS
    kind, layers = index.spec.kind, index.layers
    assert_equal(solutions(str(one), layers, kind), solutions(str(other), layers, kind))
