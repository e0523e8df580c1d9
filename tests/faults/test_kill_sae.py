"""SIGKILL of an actor and then of the driver while SAEs are trained: the next run goes on, to the same weights."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from curate.concepts import sae_files
from tests.conftest import conversation, write_jsonl
from tests.faults.test_kill import assert_all_gone, family
from tests.jobs.helpers import command, options, run_job

pytestmark = pytest.mark.slow


def wait_for(folder: Path, steps: int, process, seconds: float = 240) -> int:
    """Until a checkpoint of `steps` steps or more is whole; polls, as there is nothing else to wait on from outside."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = [int(p.parent.name.removeprefix("step-")) for p in folder.glob("*/checkpoints/*/complete.json")]
        if found and max(found) >= steps:
            return max(found)
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of {steps} steps after {seconds} s")


def test_a_killed_actor_and_a_killed_driver(model, tmp_path, capsys):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [conversation(i) for i in range(60)])
    more = {
        "sae.layers": "[1,2]",
        "sae.latents": 64,
        "sae.k": 6,
        "sae.batch_tokens": 64,
        "sae.epochs": 12,
        "sae.held_out": 0.2,
        "sae.save_every": 10,
        "sae.log_every": 10,
    }

    def given(store: str, sink: str, **extra: object) -> list[str]:
        return options(tmp_path / "corpus", model, tmp_path / sink, **{**more, "sink.store": tmp_path / store, **extra})

    process = command("sae", given("killed", "out", **{"cluster.cpus": 1, "cluster.object_store_gb": 0.2}))
    saes = tmp_path / "killed" / "saes"
    first = wait_for(saes, 20, process)
    victims = [p for p in family(process.pid) if any("_Member" in part for part in p.cmdline())]
    for victim in victims:
        victim.kill()
    wait_for(saes, first + 40, process)  # by what replaces the dead one
    relatives = family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    process.stderr.close()
    assert_all_gone(relatives)
    assert not (tmp_path / "out" / "sae.json").exists()

    inline = {"cluster": "inline", "cluster.cpus": 1, "cluster.workers": None}
    run_job("sae", given("killed", "out", **inline))
    run_job("sae", given("whole", "steady", **inline))
    found = {}
    for store in ("killed", "whole"):
        for folder in (tmp_path / store / "saes").iterdir():
            sae = sae_files.load(str(folder))
            found[store, sae.layer] = sae
    for layer in (1, 2):
        for name, tensor in found["whole", layer].tensors().items():
            assert (tensor - found["killed", layer].tensors()[name]).abs().max() <= 1e-5, (layer, name)
