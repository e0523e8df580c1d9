"""SIGKILL in the middle of a training: the same command goes on from the newest checkpoint; also of one on S3."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import command, inline, options, run_job
from tests.s3_server import serve

pytestmark = pytest.mark.slow
ROWS, EPOCHS, STEPS = 40, 5, 25


def given(corpus: Path | str, model: Path, sink: str, store: str) -> list[str]:
    more = {
        "training": "small",
        "training.epochs": EPOCHS,
        "training.save_every": 3,
        "training.log_every": 1,
        "training.lora.dropout": 0.1,
        "sink.store": store,
    }
    return inline(options(corpus, model, sink, **more))


def kill_halfway(overrides: list[str], checkpoints: Callable[[], list[str]], **env: str) -> None:
    """Until a checkpoint is whole; polls, as there is nothing else to wait on from outside."""
    process = command("train", overrides, **env)
    end = time.monotonic() + 240
    while not checkpoints():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The corpus, and the adapter of a training that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_jsonl(folder / "corpus" / "a.jsonl", [conversation(i) for i in range(ROWS)])
    run_job("train", given(folder / "corpus", model, str(folder / "out"), str(folder / "store")))
    return folder / "corpus", load((folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes())


def assert_same(found: bytes, want: dict[str, torch.Tensor]) -> None:
    weights = load(found)
    assert weights.keys() == want.keys()
    for name, weight in want.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


def test_a_killed_training_goes_on(undisturbed, model, tmp_path):
    corpus, want = undisturbed
    overrides = given(corpus, model, str(tmp_path / "out"), str(tmp_path / "store"))
    kill_halfway(overrides, lambda: list(tmp_path.rglob("complete.json")))
    assert not list(tmp_path.rglob("done.json")), "the kill came too late to test anything"
    before = next(tmp_path.rglob("log.jsonl")).read_text().count("\n")
    assert 3 <= before < STEPS
    run_job("train", overrides)
    assert_same((tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes(), want)
    lines = next(tmp_path.rglob("log.jsonl")).read_text().splitlines()
    assert len(lines) == STEPS


def test_a_killed_training_on_s3_goes_on(undisturbed, model, monkeypatch):
    corpus, want = undisturbed
    with serve() as endpoint:
        root, client = endpoint.bucket("training"), endpoint.client()

        def keys(ending: str) -> list[str]:
            found = client.list_objects_v2(Bucket="training").get("Contents", [])
            return [o["Key"] for o in found if o["Key"].endswith(ending)]

        overrides = given(corpus, model, f"{root}/out", f"{root}/store")
        kill_halfway(overrides, lambda: keys("complete.json"), **endpoint.environment)
        assert not keys("done.json"), "the kill came too late to test anything"
        endpoint.use(monkeypatch)
        run_job("train", overrides)
        body = io.BytesIO()
        client.download_fileobj("training", "out/adapter/adapter_model.safetensors", body)
        assert_same(body.getvalue(), want)
        assert keys("done.json")
        assert not keys("complete.json")
        assert not keys(".bin")
