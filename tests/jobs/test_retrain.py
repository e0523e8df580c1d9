"""Sweeps through their job, on a tiny model with a planted behaviour: what each ranking does to it; refusals."""

from __future__ import annotations

from statistics import mean

import pytest

import curate.runtime.sweep as sweep
from curate.errors import ConfigError, RecipeError, TrainingError, WorkerError
from tests.conftest import write_jsonl
from tests.jobs.helpers import complete, run_job
from tests.jobs.sweeping import ROWS, numbers, planted, row, table, trained

pytestmark = pytest.mark.usefixtures("here")


def test_the_right_ranking_lowers_and_raises_the_behaviour_and_chance_does_neither(tmp_path, model, capsys):
    run_job("retrain", planted(tmp_path, model))
    found = table(tmp_path / "out")

    def of(part: str) -> list[float]:
        return [v for arm, v in found.items() if arm.startswith(part)]

    most, least = of("response_length/remove_most"), of("response_length/remove_least")
    chance, full = of("random"), of("full")
    assert len(most) == len(least) == len(chance) == len(full) == 2
    assert max(most) < min([*chance, *full])
    assert min(least) > max([*chance, *full])
    assert mean(most) < found["base"] < mean(least)
    data = numbers(tmp_path / "out")
    assert data["rankings"]["response_length"]["roc_auc"]["value"] == 1.0
    assert len(data["arms"]) == 9
    assert all(a["losses"] for a in data["arms"] if a["kind"] != "base")
    said = capsys.readouterr()
    assert "9 arms, 8 trainings" in said.err
    assert "response_length  remove_most" in said.out
    page = (tmp_path / "out" / "retrain.html").read_text()
    assert "remove_most" in page or "remove most" in page
    stages = complete(tmp_path / "out")
    assert stages["sweep"] == (8, 8)
    assert stages["score"] == (ROWS, ROWS)


def test_a_second_sweep_trains_only_what_is_missing(tmp_path, model, capsys):
    fewer = {"sweep.seeds": "[0]", "sweep.random": 0, "sweep.modes": "[remove_most]"}
    run_job("retrain", planted(tmp_path, model, **fewer, **{"sweep.full": "false"}))
    before = trained(tmp_path / "store")
    assert len(before) == 1
    first = table(tmp_path / "out")
    capsys.readouterr()
    run_job("retrain", planted(tmp_path, model, **fewer))
    after = trained(tmp_path / "store")
    assert len(after) == 2
    assert all(after[name] == stamp for name, stamp in before.items())
    assert "trainings_done=1 trainings_left=1" in capsys.readouterr().err
    again = table(tmp_path / "out")
    assert all(again[arm] == value for arm, value in first.items())


def test_two_columns_of_one_order_train_once(tmp_path, model, capsys):
    # The same ranking under another name: activation norms rank otherwise, so a column is doubled by its scores.
    options = planted(tmp_path, model, **{"sweep.seeds": "[0]", "sweep.random": 0, "sweep.full": "false"})
    run_job("retrain", [*options, "sweep.modes=[remove_least,keep_most]"])
    assert "3 arms, 1 trainings" in capsys.readouterr().err
    found = table(tmp_path / "out")
    assert found["response_length/remove_least/0.5/s0"] == found["response_length/keep_most/0.5/s0"]


def test_one_arm_fails_and_the_rest_go_on(tmp_path, model, monkeypatch):
    train, seen = sweep.train, []

    def failing(spec, session, told=None):
        seen.append(spec)
        if len(seen) == 2:
            raise TrainingError("the loss of step 1 of 3 is nan")
        return train(spec, session)

    options = planted(tmp_path, model, **{"sweep.seeds": "[0]", "sweep.random": 0, "training.epochs": 1})
    monkeypatch.setattr(sweep, "train", failing)
    with pytest.raises(TrainingError, match=r"1 of 3 trainings failed, those of response_length/.*step 1 of 3 is nan"):
        run_job("retrain", options)
    arms = numbers(tmp_path / "out")["arms"]
    assert [a["failed"] is None for a in arms].count(False) == 1
    assert len(table(tmp_path / "out")) == 3
    monkeypatch.setattr(sweep, "train", train)
    run_job("retrain", options)
    assert len(table(tmp_path / "out")) == 4
    assert all(a["failed"] is None for a in numbers(tmp_path / "out")["arms"])


def test_a_sweep_of_which_nothing_can_be_trained(tmp_path, model):
    with pytest.raises(WorkerError, match="all 3 trainings of the sweep failed; the first: TrainingError: the loss"):
        run_job(
            "retrain",
            planted(
                tmp_path,
                model,
                **{"sweep.seeds": "[0]", "sweep.random": 0, "training.learning_rate": 1e30, "training.warmup_steps": 0},
            ),
        )


def test_influence_differentiates_the_model_trained_on_all_rows(tmp_path, model):
    more = {
        "scorer": "[gradient_product]",
        "scorer.gradient_product.behaviours": "[contrast]",
        "query": "file",
        "query.path": tmp_path / "pairs.jsonl",
        "sweep.seeds": "[0]",
        "sweep.random": 0,
    }
    run_job("retrain", planted(tmp_path, model, **more))
    recipe = (tmp_path / "out" / "scores" / "recipe.json").read_text()
    assert '"adapter": null' in recipe  # of the base model
    assert len(trained(tmp_path / "store")) == 3  # the full arm is the model that is differentiated
    data = numbers(tmp_path / "out")
    assert any("differentiate the model trained on all rows" in note for note in data["notes"])
    run_job("retrain", planted(tmp_path, model, **more))  # finds its scores
    with pytest.raises(RecipeError, match="tuned"):
        run_job("retrain", planted(tmp_path, model, **more, **{"sweep.tuned": "false"}))


def test_scores_of_another_run_are_taken_as_they_are(tmp_path, model):
    run_job("score", planted(tmp_path, model, sink="scored"))
    more = {"sink.scores": tmp_path / "scored" / "scores", "sweep.seeds": "[0]", "sweep.random": 0}
    run_job("retrain", planted(tmp_path, model, **more, scorer="[random]"))
    assert "response_length/remove_most/0.5/s0" in table(tmp_path / "out")
    assert not (tmp_path / "out" / "scores").exists()


def test_labels_of_one_class_are_said(tmp_path, model, capsys):
    options = planted(tmp_path, model, **{"sweep.seeds": "[0]", "sweep.random": 0, "sweep.full": "false"})
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [row(i) | {"label": "red"} for i in range(ROWS)])
    run_job("retrain", [*options, "sweep.modes=[remove_most]"])
    assert "of one class: all have the label 'red'" in capsys.readouterr().err
    assert numbers(tmp_path / "out")["rankings"] == {}


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"sweep.fractions": "[0.5,1.5]"}, ConfigError, r"sweep\.fractions has 1\.5"),
        ({"sweep.columns": "[response_lenght]"}, ConfigError, "which was not scored; did you mean 'response_length'"),
        ({"evaluator": "[]", "evaluator.answer_pairs.path": None}, ConfigError, "no evaluator is chosen"),
        ({"sweep.trait": "answer_pairs.margn"}, ConfigError, r"sweep\.trait is 'answer_pairs.margn'.*margin"),
        ({"source.max_rows": 2, "sweep.fractions": "[0.9]"}, ConfigError, "cannot be trained.*leaves none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path, model, change, error, told):
    with pytest.raises(error, match=told):
        run_job("retrain", planted(tmp_path, model, **change))
    assert not (tmp_path / "store" / "trainings").exists()


def test_a_plan_says_what_is_to_be_done_and_trains_nothing(tmp_path, model, capsys):
    fewer = {"sweep.seeds": "[0]", "sweep.random": 0, "sweep.modes": "[remove_most]"}
    run_job("retrain", planted(tmp_path, model, **fewer, plan="true"))
    said = capsys.readouterr().out
    assert "arms          3 of 1 score column(s): response_length" in said
    assert "trainings     2, 0 of them done already" in said
    assert f"rows          {ROWS + ROWS // 2:,} in all trainings" in said
    assert "tokens/s of one training" in said
    assert "answer_pairs  8 likelihoods of each of 3 models" in said
    assert "not scored yet" in said
    assert not (tmp_path / "store" / "trainings").exists()
    run_job("retrain", planted(tmp_path, model, **fewer))
    capsys.readouterr()
    run_job("retrain", planted(tmp_path, model, **fewer, plan="true"))
    said = capsys.readouterr().out
    assert "trainings     2, 2 of them done already" in said
    assert "not scored yet" not in said
