"""The train job, inline: an adapter in the sink that the model takes, found again by a second run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from curate.errors import ConfigError, RecipeError, TrainingError
from curate.models.load import ModelSpec, load_model
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import options, run_job

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def given(model, tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [conversation(i) for i in range(30)])

    def make(sink: str = "out", **more: object) -> list[str]:
        base = {"training": "small", "sink.store": tmp_path / "store", "training.epochs": 1, "training.log_every": 1}
        return options(tmp_path / "corpus", model, tmp_path / sink, **{**base, **more})

    return make


def test_an_adapter_is_trained_and_found_again(given, model, tmp_path, capsys):
    run_job("train", given())
    told = capsys.readouterr().out
    assert "30 rows, 4 steps" in told
    assert f"adapter: {tmp_path}/out/adapter" in told
    (training,) = (tmp_path / "store" / "trainings").iterdir()
    log = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / "adapter" / name).read_bytes() == (training / "adapter" / name).read_bytes()
    load_model(ModelSpec(str(model), str(tmp_path / "out" / "adapter"), device="cpu"))
    stamp = (training / "done.json").stat().st_mtime_ns
    run_job("train", given("again"))
    assert (training / "done.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "again" / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(RecipeError, match=r"training\.seed: there 0, now 1"):
        run_job("train", given(**{"training.seed": 1}))
    # A shorter source is another training on the same tokens.
    run_job("train", given("few", **{"source.max_rows": 10}))
    assert len(list((tmp_path / "store" / "trainings").iterdir())) == 2
    assert len(list((tmp_path / "store" / "tokens").iterdir())) == 1


def test_what_a_training_does_is_counted_once(given, tmp_path, monkeypatch):
    counted: list[tuple[str, float]] = []
    shares: list[float] = []

    def count(name: str, n: float, stage: str | None = None) -> None:
        if stage == "train" and n:
            counted.append((name, n))

    def level(name: str, value: float, stage: str) -> None:
        if (name, stage) == ("curate_share_of_peak", "train"):
            shares.append(value)

    monkeypatch.setattr("curate.runtime.train.EVERY_SECONDS", 0.01)  # lines are told while it runs
    monkeypatch.setattr("jobs.training.metrics.count", count)
    monkeypatch.setattr("jobs.training.metrics.level", level)
    run_job("train", given(**{"training.epochs": 3, "cluster.peak_tflops": 2}))
    (training,) = (tmp_path / "store" / "trainings").iterdir()
    done = json.loads((training / "done.json").read_text())
    sums = {name: sum(n for other, n in counted if other == name) for name, _ in counted}
    want = {"curate_rows": 90, "curate_tokens": done["tokens"], "curate_flops": done["flops"]}
    assert sums == pytest.approx(want)
    last = json.loads((training / "log.jsonl").read_text().splitlines()[-1])
    assert shares[-1] == pytest.approx(done["flops"] / last["seconds"] / 2e12)
    counted.clear()
    run_job("train", given("again", **{"training.epochs": 3, "cluster.peak_tflops": 2}))
    assert counted == []


def test_settings_that_fail_do_not_bar_the_place_to_better_ones(given, tmp_path):
    with pytest.raises(TrainingError, match="loss of step"):
        run_job("train", given(**{"training.learning_rate": 1e30, "training.warmup_steps": 0}))
    run_job("train", given())
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_whole_model_is_trained(given, tmp_path):
    run_job("train", given(**{"training.method": "full", "training.learning_rate": 1e-3}))
    model = load_model(ModelSpec(str(tmp_path / "out" / "model"), device="cpu"))
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert not list(Path(tmp_path).rglob("*.bin"))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"training.lora.targets": "[q_prj]"}, ConfigError, r"training\.lora\.targets=\['q_prj'\]"),
        ({"training.lora.targets": "mpl"}, ConfigError, "training.lora.targets"),
        ({"training.learning_rate": 1e30, "training.warmup_steps": 0}, TrainingError, "loss of step"),
        ({"training.batch_size": 0}, ConfigError, r"training\.batch_size is 0"),
        ({"training.seed": -1}, ConfigError, r"training\.seed is -1"),
        ({"training.workers": 2}, ConfigError, r"training\.workers=2 needs Ray"),
    ],
)
def test_bad_settings(given, change, error, told):
    with pytest.raises(error, match=told):
        run_job("train", given(**change))
