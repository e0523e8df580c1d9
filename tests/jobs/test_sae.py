"""The sae job, inline: SAEs of several layers, inserted, one chosen; found again; killed and gone on with; refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curate.concepts import sae_files
from curate.corpus.example import ColumnMap
from curate.errors import ConfigError, RecipeError, StorageError
from curate.evaluation.likelihood import likelihoods
from curate.models.load import ModelSpec, identity, load_model
from curate.models.splice import spliced
from curate.runtime.cluster import ClusterSpec
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.reader import ReaderSpec
from curate.runtime.sae_layers import held_out
from curate.runtime.session import session
from curate.training import sae_trainer
from curate.training.sae_settings import SaeSettings
from tests.adapters import save_adapter
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import complete, inline, options, run_job


class Given:
    """A corpus, a store, and the job's options."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.store = model, folder, folder / "store"
        write_jsonl(folder / "corpus" / "a.jsonl", [conversation(i) for i in range(40)])

    def run(self, sink: str = "out", **more: object) -> dict:
        """The job, and what it found."""
        base = {
            "sink.store": self.store,
            "sae.latents": 48,
            "sae.k": 6,
            "sae.batch_tokens": 64,
            "sae.buffer_tokens": 2000,
            "sae.held_out": 0.2,
            "sae.epochs": 2,
            "sae.learning_rate": 3e-3,
            "sae.log_every": 4,
        }
        run_job("sae", inline(options(self.folder / "corpus", self.model, self.folder / sink, **{**base, **more})))
        return json.loads((self.folder / sink / "sae.json").read_text())

    def files(self) -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in self.store.rglob("*") if p.is_file()}


@pytest.fixture
def given(model, tmp_path) -> Given:
    return Given(model, tmp_path)


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory) -> Given:
    """After one run into `out`."""
    made = Given(model, tmp_path_factory.mktemp("swept"))
    made.found = made.run()
    return made


def test_a_layer_is_chosen_and_its_sae_is_in_the_sink(swept, capsys):
    found = swept.run()
    told = capsys.readouterr().out
    assert found == swept.found
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]  # the middle half of three blocks
    assert found["middle"] == [1, 2]
    drops = {layer["layer"]: layer["drop"]["value"] for layer in found["layers"]}
    assert found["chosen"] == min(drops, key=lambda layer: drops[layer])
    assert f"chosen: layer {found['chosen']}, the smallest drop within the middle half 1..2" in told
    sae = sae_files.load(str(swept.folder / "out" / "sae"))
    assert (sae.layer, sae.latents, sae.k, sae.name) == (found["chosen"], 48, 6, f"sae-L{found['chosen']}")
    assert sae.model["digest"] == identity(ModelSpec(str(swept.model)))["digest"]
    page = (swept.folder / "out" / "sae.html").read_text()
    assert f"Layer {found['chosen']} is chosen" in page
    assert "<script" not in page
    (row,) = [layer for layer in found["layers"] if layer["layer"] == found["chosen"]]
    assert row["drop"]["value"] == pytest.approx(row["after"]["value"] - row["before"]["value"], abs=1e-9)
    assert row["explained_variance"] > 0.3
    assert 0 < row["l0"] <= 6
    assert complete(swept.folder / "out")["evaluate"] == (3, 3)  # the model as it is, and with each layer's SAE


def test_the_loss_after_insertion_is_that_of_the_spliced_model(swept):
    """Of rows that no SAE has seen."""
    spec, columns = ModelSpec(str(swept.model), device="cpu"), ColumnMap(label="label", group="group")
    with session(ClusterSpec(address="inline", cpus=1)):
        source = SourceSpec(str(swept.folder / "corpus"), "jsonl", columns, 10, False)
        manifest, _, resolved = build_manifest(source, None)
    reader = ReaderSpec("jsonl", resolved, spec, 2048, "quarantine")
    rows = held_out(reader, manifest, SaeSettings(held_out=0.2))
    model = load_model(spec)

    def loss() -> float:
        found = likelihoods(model, rows.rendered, 200, 0)
        return sum(-x.nats / x.tokens for x in found) / len(found)

    for layer in swept.found["layers"]:
        assert layer["before"]["value"] == pytest.approx(loss(), abs=1e-5)
        with spliced(model, sae_files.load(layer["url"])):
            assert layer["after"]["value"] == pytest.approx(loss(), abs=1e-5)
    parts = (swept.store / "activations").rglob("*.parquet")
    trained = {row for part in parts for row in pq.read_table(part)["row"].to_pylist()}
    seen = {e.row for e in rows.examples}
    assert len(trained) + len(seen) == 40
    assert not trained & seen


def test_a_second_run_finds_everything_and_another_layer_trains_that_one_alone(swept):
    files = swept.files()
    assert swept.run("again") == swept.found
    assert swept.files() == files
    with pytest.raises(RecipeError, match=r"settings\.k: there 6, now 5"):
        swept.run(**{"sae.k": 5})
    found = swept.run("more", **{"sae.layers": "[0,1,2]"})
    assert found["layers"][1:] == swept.found["layers"]
    assert len(list((swept.store / "saes").iterdir())) == 3
    now = swept.files()
    assert all(now[p] == stamp for p, stamp in files.items())


def test_killed_after_a_layer_it_goes_on_with_the_next(swept, given, monkeypatch, capsys):
    real, ended = sae_trainer.sae_files.save, []

    def save(url, sae):
        if len(ended) == 1:
            ended.append(None)
            raise StorageError("killed")
        ended.append(sae.layer)
        return real(url, sae)

    monkeypatch.setattr(sae_trainer.sae_files, "save", save)
    with pytest.raises(StorageError, match="killed"):
        given.run()
    found = given.run()
    assert "sae: resuming layers_done=1 layers_left=1" in capsys.readouterr().err
    assert ended == [1, None, 2]
    for a, b in zip(found["layers"], swept.found["layers"], strict=True):
        assert a["after"]["value"] == pytest.approx(b["after"]["value"], abs=1e-6)


def test_an_evaluator_decides_where_one_is_chosen(swept, tmp_path):
    """By answers and by likelihoods of the model with the SAE in it."""
    questions = [
        {"id": f"q{i}", "question": f"which word {i}?", "choices": [f"word{i}", f"word{i + 1}"], "answer": i % 2}
        for i in range(6)
    ]
    more = {
        "evaluator": "[multiple_choice]",
        "evaluator.multiple_choice.path": write_jsonl(tmp_path / "mcq.jsonl", questions),
        "evaluator.multiple_choice.max_new_tokens": 3,
    }
    for sink, metric in (("mcq", "accuracy"), ("by_likelihood", "accuracy_likelihood")):
        found = swept.run(sink, **more, **{"sae.metric": f"multiple_choice.{metric}"})
        assert (found["evaluator"], found["metric"]["name"]) == ("multiple_choice", metric)
        for layer in found["layers"]:
            assert layer["drop"]["value"] == pytest.approx(layer["before"]["value"] - layer["after"]["value"])
            assert layer["drop"]["n"] == 6


def test_the_model_whose_states_are_read_is_the_finetuned_one(given):
    adapter = save_adapter(given.folder / "adapter", given.model)
    given.run(**{"tuned": "adapter", "tuned.adapter": adapter, "sae.layers": "[2]", "sae.activation": "relu"})
    sae = sae_files.load(str(given.folder / "out" / "sae"))
    assert sae.model["adapter"] is not None
    assert sae.activation == "relu"


def test_joint_training_lowers_the_loss_of_the_spliced_model(given):
    found = {}
    for weight in (0.0, 1.0):
        more = {"sae.task": weight, "sae.layers": "[1]", "sae.k": 2, "sae.activation": "topk"}
        (found[weight],) = given.run(f"task{weight}", **more)["layers"]
    assert found[1.0]["after"]["value"] < found[0.0]["after"]["value"]
    assert found[1.0]["explained_variance"] > 0.1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sae.layers": "[1,7]"}, r"sae\.layers holds 7, but in a model of 3 blocks"),
        ({"sae.k": 49}, r"sae\.k is 49, more than sae\.latents=48"),
        ({"sae.held_out": 1e-9}, "leaves out none of 40 rows"),
        ({"sae.metric": "held_out_rows.los"}, r"did you mean 'held_out_rows\.loss'"),
        ({"sae.activation": "gelu"}, "sae.activation"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(given, change, told):
    with pytest.raises(ConfigError, match=told):
        given.run(**change)
    assert not (given.store / "activations").exists()


def test_no_row_held_out_is_said_before_any_work_also_where_an_evaluator_decides(given):
    path = {"evaluator": "[held_out_loss]", "evaluator.held_out_loss.path": given.folder / "corpus" / "a.jsonl"}
    with pytest.raises(ConfigError, match="leaves out none of 40 rows"):
        given.run(**{"sae.held_out": 1e-9, **path})
    assert not (given.store / "activations").exists()
