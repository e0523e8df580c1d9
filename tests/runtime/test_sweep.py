"""How many trainings fit a cluster at once, and on which kind of accelerator."""

from __future__ import annotations

import pytest

import curate.runtime.sweep as sweep
from curate.errors import WorkerError
from curate.runtime.inline import inline
from curate.runtime.session import Pool, Readers, Session
from curate.runtime.sweep import Outcome, Slots, check_outcomes, slots


def session(size: int, cpus: float, gpus: float) -> Session:
    pool = Pool(size, cpus, gpus)
    return Session(pool, pool, Readers(1, 0.25), 1024, 1024, 1)


def node(alive: bool = True, **resources: float) -> dict:
    return {"Alive": alive, "Resources": resources}


def test_on_processors_each_training_takes_its_workers_share():
    assert slots(session(8, 1.0, 0.0), 1, None) == Slots(8)
    assert slots(session(8, 1.0, 0.0), 4, None) == Slots(2)
    assert slots(session(8, 1.0, 0.0), 1, 3) == Slots(3)
    assert slots(session(2, 1.0, 0.0), 4, None) == Slots(1)  # Ray Train says what does not fit


def test_of_several_kinds_of_gpu_the_commonest_is_taken(monkeypatch, capsys):
    nodes = [
        node(CPU=8),
        node(GPU=2, **{"accelerator_type:A100": 1.0}),
        node(GPU=4, **{"accelerator_type:H100": 1.0}),
        node(GPU=4, **{"accelerator_type:H100": 1.0}),
        node(alive=False, GPU=64, **{"accelerator_type:A100": 1.0}),
    ]
    monkeypatch.setattr(sweep.ray, "nodes", lambda: nodes)
    assert slots(session(10, 1.0, 1.0), 1, None) == Slots(8, "H100")
    assert slots(session(10, 1.0, 1.0), 2, None) == Slots(4, "H100")
    assert slots(session(10, 1.0, 1.0), 1, 3) == Slots(3, "H100")
    assert "all trainings run on H100; left idle: A100" in capsys.readouterr().err


def test_inline_there_is_one():
    with inline():
        assert slots(session(4, 1.0, 0.0), 1, 4) == Slots(1)


def test_a_sweep_of_which_nothing_came_is_an_error():
    check_outcomes({"a": Outcome(None, "TrainingError: nan"), "b": Outcome({})})
    check_outcomes({})
    with pytest.raises(WorkerError, match="all 1 trainings of the sweep failed; the first: TrainingError: nan"):
        check_outcomes({"a": Outcome(None, "TrainingError: nan")})
