"""Trainings as products of a store: by Ray Train as in one process, made once, errors in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from curate.errors import ConfigError, TrainingError
from curate.runtime.cluster import ClusterSpec
from curate.runtime.session import session
from curate.runtime.train import finished, losses, train
from tests.runtime.training import Trained


@pytest.fixture
def trained(corpus, model, tmp_path):
    def make(store: str = "store") -> Trained:
        return Trained(corpus, model, tmp_path / store, max_rows=30)

    return make


def inline(spec, told=lambda line: None):
    with session(ClusterSpec(address="inline", cpus=1)) as here:
        return train(spec, here, told)


def weights(done) -> dict[str, torch.Tensor]:
    return load_file(f"{done['result']}/adapter_model.safetensors")


@pytest.mark.slow
def test_two_workers_are_as_good_as_one(trained, running):
    alone = trained("one").spec()
    want = inline(alone)
    shared = trained("two").spec(workers=2)
    found = train(shared, running)
    assert shared.recipe == alone.recipe  # the number of workers changes nothing, so that either finds the other's
    np.testing.assert_allclose(losses(shared.url), losses(alone.url), rtol=0, atol=1e-4)
    assert [step for step, _ in losses(shared.url)] == [1, 2, 3, 4]
    assert {k: found[k] for k in ("steps", "rows", "tokens")} == {k: want[k] for k in ("steps", "rows", "tokens")}
    one, two = weights(want), weights(found)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_error_of_a_worker_is_said_in_words_from_within_a_task_too(trained, running):
    spec = trained().spec(learning_rate=1e30, warmup_steps=0)

    @ray.remote(num_cpus=0, max_retries=0)
    def task() -> str:
        try:
            train(spec, running)
        except TrainingError as e:
            return str(e)
        return "trained"

    assert "the loss of step" in ray.get(task.remote())
    assert finished(spec) is None


def test_a_training_is_made_once(trained):
    spec = trained().spec()
    done = inline(spec)
    stamps = {p: p.stat().st_mtime_ns for p in Path(spec.url).rglob("*") if p.is_file()}
    assert inline(spec) == done == finished(spec)
    assert {p: p.stat().st_mtime_ns for p in Path(spec.url).rglob("*") if p.is_file()} == stamps
    assert json.loads((Path(spec.url) / "recipe.json").read_text())["digest"] == spec.recipe.digest
    assert done["result"] == spec.result


def test_what_a_training_is_made_from(trained):
    made = trained()
    keep = np.ones(30, bool)
    everything = made.spec()
    assert made.spec(keep).url == everything.url
    keep[3] = False
    for other in (made.spec(keep), made.spec(seed=4), made.spec(epochs=2), made.spec(method="full")):
        assert other.url != everything.url
    for same in (made.spec(micro_batch=2), made.spec(save_every=7), made.spec(workers=2)):
        assert same.url == everything.url
    assert replace(everything, identity={**made.identity, "digest": "another"}).url != everything.url


def test_only_kept_rows_are_trained_on(trained):
    made = trained()
    keep = np.zeros(30, bool)
    keep[[2, 5, 11]] = True
    done = inline(made.spec(keep))
    assert (done["rows"], done["steps"]) == (3, 1)


def test_bad_input(trained, running):
    made = trained()
    with pytest.raises(TrainingError, match="no rows are left"):
        inline(made.spec(np.zeros(30, bool)))
    with pytest.raises(ConfigError, match=r"shape \(7,\), the corpus 30 rows"):
        made.spec(np.ones(7, bool))
    with pytest.raises(ConfigError, match=r"training\.workers=2 needs Ray"):
        inline(made.spec(workers=2))
    with pytest.raises(ConfigError, match=r"training\.workers=8 .* does not fit the cluster"):
        train(made.spec(workers=8), running)
