"""`curate evaluate`: the base model and adapters through the job, its table, its numbers, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.schema import settings
from curate.errors import ConfigError, ModelError
from jobs.app import compose_config
from jobs.evaluation import Evaluating
from jobs.pipeline import Pipeline
from tests.adapters import save_adapter
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import options, run_job
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "held_out.jsonl", [conversation(i) for i in range(8)])


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return [save_adapter(root / name / "adapter", model, seed=i) for i, name in enumerate(("x", "y"))]


def given(corpus, model, sink, rows, **more):
    base = {
        "evaluator": "[held_out_loss]",
        "evaluator.held_out_loss.path": rows,
        "generation.engine": "transformers",
        "sink.store": Path(sink) / "store",
        **more,
    }
    return options(corpus, model, sink, **base)


def test_base_tuned_and_more_adapters(corpus, model, rows, adapters, tmp_path, capsys):
    tuned = save_adapter(tmp_path / "tuned", model, seed=7)
    more = {"tuned": "adapter", "tuned.adapter": tuned, "evaluation.adapters": f"[{adapters[0]},{adapters[1]}]"}
    run_job("evaluate", given(corpus, model, tmp_path / "out", rows, **more))
    said = capsys.readouterr()
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = {e["model"]: e["measures"]["loss"]["value"] for e in body["evaluations"]}
    assert list(found) == ["base", "tuned", "x", "y"] == list(body["models"])
    assert len(set(found.values())) == 4
    assert body["metrics"]["held_out_loss"][0]["sense"] == "loss"
    lines = said.out.splitlines()
    head = ["model", "evaluator", "metric", "value", "95 % interval", "from base", "95 % interval", "items", "missing"]
    assert [cell.strip() for cell in lines[0].split("  ") if cell] == head
    changes = {e["model"]: e["from_base"] for e in body["evaluations"]}
    assert changes["base"] == {}
    for name in ("tuned", "x", "y"):
        change = changes[name]["loss"]
        assert change["value"] == pytest.approx(found[name] - found["base"], abs=1e-9)
        assert change["low"] < change["value"] < change["high"]
    for line, (name, value) in zip(lines[1:5], found.items(), strict=True):
        assert line.startswith(name)
        assert f"{value:.4g}" in line
    assert said.out.count("held_out_loss") == 4
    run_job("evaluate", given(corpus, model, tmp_path / "out", rows, **more))
    again = capsys.readouterr()
    assert again.out == said.out
    assert "likelihoods" not in again.err


def test_the_tuned_model_alone(corpus, model, rows, tmp_path):
    whole = save_tiny(tmp_path / "whole", layers=3, seed=4)
    more = {"tuned.path": whole, "evaluation.base": "false"}
    run_job("evaluate", given(corpus, model, tmp_path / "out", rows, **more))
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert body["models"] == {"tuned": str(whole)}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"evaluator": None, "evaluator.held_out_loss.path": None}, "no evaluator is chosen"),
        ({"evaluation.base": "false"}, "leaves no model to ask"),
        ({"evaluator.held_out_loss.first": 100}, r"there is no row \[100, end\)"),
    ],
)
def test_settings_that_make_no_sense(corpus, model, rows, tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        run_job("evaluate", given(corpus, model, tmp_path / "out", rows, **more))


def test_an_adapter_of_another_model(corpus, model, rows, tmp_path):
    other = save_adapter(tmp_path / "other", save_tiny(tmp_path / "wide", d=64))
    with pytest.raises(ModelError, match="does not fit LlamaForCausalLM"):
        run_job("evaluate", given(corpus, model, tmp_path / "out", rows, **{"evaluation.adapters": f"[{other}]"}))


def test_names_of_adapters(corpus, model, rows, tmp_path):
    urls = ["/a/one/adapter", "/b/one/adapter", "s3://c/two", "/d/base"]
    chosen = {"evaluation.adapters": f"[{','.join(urls)}]"}
    pipeline = Pipeline(settings(compose_config("evaluate", given(corpus, model, tmp_path / "out", rows, **chosen))))
    names = [m.key for m in Evaluating(pipeline).models]
    assert names == ["base", "/a/one/adapter", "/b/one/adapter", "two", "/d/base"]
