"""A short fine-tune on a tiny model: it learns, it is deterministic, and load_model reads what it saves."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from bench import finetune as bench
from bench.finetune import LoraSpec, finetune, mean_loss, save, split
from curate.corpus.render import Rendered
from curate.errors import ConfigError
from curate.models.load import ModelSpec, load_model
from curate.models.tracked import LayerChoice
from tests.tiny import save_tiny, tiny_model


def rows(n: int, seed: int = 0) -> list[Rendered]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 20, (n,), generator=draw).tolist()
    # Responses of one token that repeats: something that a few steps can learn.
    return [
        Rendered([*torch.randint(4, 300, (4,), generator=draw).tolist(), *[7] * (k - 4)], 4, k - 1, k) for k in lengths
    ]


@pytest.fixture
def model(tmp_path):
    return ModelSpec(str(save_tiny(tmp_path / "model")))


def test_the_loss_is_the_mean_over_rows_of_their_mean_response_losses():
    model, some = tiny_model(), rows(5)
    expected = []
    for row in some:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        expected.append(F.cross_entropy(logits[row.start - 1 : row.end - 1], torch.tensor(row.input_ids[row.start :])))
    for budget in (1, 30, 1000):
        assert mean_loss(model, some, budget) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_it_learns_and_what_it_saves_is_the_model_that_it_trained(model, tmp_path):
    some = rows(24)
    tuned, history = finetune(model, some, LoraSpec(r=4, epochs=2, learning_rate=1e-2))
    assert len(history) == 6
    assert history[-1] < 0.8 * history[0]
    save(tuned, tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]
    merged = load_model(ModelSpec(model.path, adapter=str(tmp_path / "adapter")))
    inner = tuned.get_base_model()
    assert mean_loss(merged, some) == pytest.approx(mean_loss(inner, some), rel=1e-5)
    assert mean_loss(merged, some) < 0.8 * mean_loss(load_model(model), some)
    with pytest.raises(ConfigError, match="not empty"):
        save(tuned, tmp_path / "adapter")


def test_the_token_budget_changes_nothing_and_the_seed_does(model):
    found = {
        name: finetune(model, rows(16), LoraSpec(r=2, token_budget=budget, seed=seed))[1]
        for name, budget, seed in (("small", 20, 0), ("large", 4000, 0), ("again", 20, 0), ("other", 20, 1))
    }
    assert found["small"] == found["again"]
    assert found["small"] == pytest.approx(found["large"], rel=1e-4)
    assert found["small"] != found["other"]


def test_layers_are_those_chosen(model):
    tuned, _ = finetune(model, rows(4), LoraSpec(r=2, layers=LayerChoice("mlp", first=2)))
    names = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert names
    assert all(".layers.2.mlp." in n for n in names)


@pytest.mark.parametrize("bad", [{"r": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"epochs": 0}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError, match="fine-tune"):
        LoraSpec(**bad)


def test_no_rows_are_refused(model):
    with pytest.raises(ConfigError, match="no rows"):
        finetune(model, [], LoraSpec())


def test_held_out_rows_are_spread_and_not_trained_on():
    train, held = split(list(range(10)), 3)
    assert held == [0, 3, 6]
    assert train == [1, 2, 4, 5, 7, 8, 9]
    assert split([1, 2], 0) == ([1, 2], [])


def test_the_command_prints_the_loss_before_and_after(model, tmp_path, capsys):
    before = torch.get_num_threads()
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "response": "Five, of course."}) + "\n" for i in range(12))
    )
    try:
        bench.main(["--rows", str(data), "--out", str(tmp_path / "a"), "--model", model.path, "--held-out", "2",
                    "--batch", "2", "--lr", "0.01", "--warmup", "1"])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    found = {line["metric"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    loss = found["held_out_loss"]["value"]
    assert loss["after"] < loss["before"]
    assert found["seconds"]["settings"]["rows"] == 10
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
