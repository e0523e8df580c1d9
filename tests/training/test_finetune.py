"""One fine-tune against a plain PyTorch loop; accumulation, resume, places, bad input."""

from __future__ import annotations

import gc
import json
import random
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from curate.errors import ConfigError, TrainingError
from curate.models.load import ModelSpec, load_model
from curate.training import checkpoints
from curate.training import finetune as module
from curate.training.adapt import load_for_training
from curate.training.finetune import finetune
from curate.training.log import read_log
from curate.training.spec import LoraSpec, TrainingSpec
from tests.training.sample import dataset, make_rows, plain_loop, shuffled_steps

ROWS = make_rows(21)


def spec(**more) -> TrainingSpec:
    base = {
        "lora": LoraSpec(r=4, alpha=8),
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "batch_size": 8,
        "micro_batch": 4,
        "epochs": 2,
        "seed": 3,
        "dtype": "float32",
        "log_every": 1,
        "save_every": 100,
    }
    return TrainingSpec(**{**base, **more})


def run(training, model, folder, rows=ROWS, **more):
    """(done, weights of the result) of a training at folder/train."""
    done = finetune(training, ModelSpec(str(model), device="cpu"), dataset(rows, folder), str(folder / "train"), **more)
    name = "adapter_model.safetensors" if training.method == "lora" else "model.safetensors"
    return done, load_file(f"{done['result']}/{name}")


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_log(str(folder / "train"))]


def same(a, b, atol) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_losses_are_those_of_a_plain_loop(tiny, tmp_path, method):
    training = spec(method=method)
    done, weights = run(training, tiny, tmp_path)
    # The same first weights, trained by hand.
    if method == "lora":
        by_hand = load_for_training(ModelSpec(str(tiny), device="cpu"), training)
    else:
        by_hand = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    steps = shuffled_steps(len(ROWS), 8, 2, 3)
    want = plain_loop(by_hand, ROWS, steps, 2e-3, 2, 1.0)
    assert len(want) == done["steps"] == 6
    np.testing.assert_allclose(losses(tmp_path), want, rtol=0, atol=1e-5)
    trained = {n: p for n, p in by_hand.named_parameters() if p.requires_grad}
    moved = 0.0
    for name, weight in trained.items():
        torch.testing.assert_close(weights[name.replace(".default", "")], weight.data, rtol=0, atol=2e-5)
        moved = max(moved, weight.abs().max().item())
    assert moved > 1e-3
    assert done["tokens"] == 2 * sum(r[2] for r in ROWS)
    assert done["rows"] == len(ROWS)
    assert (done["first_loss"], done["final_loss"]) == (losses(tmp_path)[0], losses(tmp_path)[-1])
    assert json.loads((tmp_path / "train" / "done.json").read_text()) == done


@pytest.mark.parametrize("change", [{"micro_batch": 8}, {"micro_batch": 1}, {"gradient_checkpointing": True}])
def test_what_does_not_matter_does_not_matter(tiny, tmp_path, change):
    _, one = run(spec(), tiny, tmp_path / "one")
    _, other = run(spec(**change), tiny, tmp_path / "other")
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "other"), rtol=0, atol=1e-5)
    same(one, other, 1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_that_was_cut_off_goes_on_as_if_it_had_not_been(tiny, tmp_path, method):
    # Dropout draws random numbers, so that their state matters too.
    training = spec(method=method, lora=LoraSpec(r=4, alpha=8, dropout=0.2), save_every=2)
    _, want = run(training, tiny, tmp_path / "whole")

    def stop(line) -> None:
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(training, tiny, tmp_path / "cut", report=stop)
    place = str(tmp_path / "cut" / "train")
    assert checkpoints.newest(f"{place}/checkpoints") == 4
    seen: list[int] = []
    _, found = run(training, tiny, tmp_path / "cut", report=lambda line: seen.append(line["step"]))
    assert seen == [5, 6]
    same(found, want, 1e-6)
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=0, atol=1e-6)
    assert not list((tmp_path / "cut" / "train" / "checkpoints").rglob("*.*"))  # of no use once it is done
    seconds = [line["seconds"] for line in read_log(place)]
    assert seconds == sorted(seconds)


def test_a_checkpoint_that_is_not_whole_is_not_used(tmp_path):
    url, made = str(tmp_path / "checkpoints"), tmp_path / "made"
    made.mkdir()
    (made / "weights").write_bytes(b"12345")
    assert checkpoints.newest(url) is None
    for step in (10, 20):
        checkpoints.complete(url, step, checkpoints.upload(made, checkpoints.step_url(url, step)))
    assert checkpoints.newest(url) == 20
    assert not (tmp_path / "checkpoints" / "step-00000010").exists()
    checkpoints.upload(made, checkpoints.step_url(url, 30))  # killed before it was complete
    assert checkpoints.newest(url) == 20
    (tmp_path / "checkpoints" / "step-00000020" / "weights").write_bytes(b"123")
    assert checkpoints.newest(url) is None


def test_the_adapter_is_one_that_the_rest_of_the_library_reads(tiny, tmp_path):
    done, _ = run(spec(), tiny, tmp_path)
    config = json.loads((tmp_path / "train" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)
    assert config["use_rslora"] is True
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == names
    files = {p.name for p in (tmp_path / "train" / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}  # nothing pickled, no empty card
    ids = torch.tensor([ROWS[0][0]])
    with torch.no_grad():
        tuned = load_model(ModelSpec(str(tiny), done["result"], device="cpu"))(ids).logits
        base = load_model(ModelSpec(str(tiny), device="cpu"))(ids).logits
    assert (tuned - base).abs().max() > 1e-3


def test_a_whole_model_is_one_that_the_rest_of_the_library_reads(tiny, tmp_path):
    done, weights = run(spec(method="full", dtype="bfloat16", epochs=1), tiny, tmp_path)
    model = load_model(ModelSpec(done["result"], device="cpu"))
    assert weights["model.norm.weight"].dtype == torch.bfloat16
    assert model.config.vocab_size == load_model(ModelSpec(str(tiny), device="cpu")).config.vocab_size
    assert np.isfinite(losses(tmp_path)).all()


@pytest.mark.parametrize(("targets", "inside", "outside"), [("attention", "attn", "mlp"), ("mlp", "mlp", "attn")])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_targets(tmp_path, kind, targets, inside, outside):
    from tests.tiny import save_tiny

    model = save_tiny(tmp_path / "model", kind=kind, layers=2)
    tuned = load_for_training(ModelSpec(str(model), device="cpu"), spec(lora=LoraSpec(r=2, targets=targets)))
    names = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert names
    assert all(inside in n and outside not in n for n in names)


def test_the_process_keeps_its_random_numbers(tiny, tmp_path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run(spec(epochs=1), tiny, tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_gone_when_the_training_is_over(tiny, tmp_path, monkeypatch, dtype):
    made: list[weakref.ref] = []

    def load(*given):
        model = load_for_training(*given)
        made.append(weakref.ref(next(model.parameters())))
        return model

    monkeypatch.setattr(module, "load_for_training", load)
    gc.disable()  # what goes by chance does not count
    try:
        run(spec(epochs=1, dtype=dtype), tiny, tmp_path)
    finally:
        gc.enable()
    assert [ref() for ref in made] == [None]


def test_bad_input(tiny, tmp_path):
    with pytest.raises(TrainingError, match="no rows are left"):
        run(spec(), tiny, tmp_path / "none", rows=[])
    with pytest.raises(ConfigError, match=r"training\.lora\.targets=\['q_prj'\].*linear layers are .*q_proj"):
        run(spec(lora=LoraSpec(targets=["q_prj"])), tiny, tmp_path / "targets")
    with pytest.raises(TrainingError, match=r"the loss of step \d of 6 is (nan|inf).*learning_rate"):
        run(spec(learning_rate=1e30, warmup_steps=0), tiny, tmp_path / "diverges")
    assert not (tmp_path / "diverges" / "train" / "done.json").exists()
    done, _ = run(spec(epochs=1), tiny, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"training\.method=full"):
        load_for_training(ModelSpec(str(tiny), done["result"]), spec())
