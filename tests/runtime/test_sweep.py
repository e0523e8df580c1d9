"""How many trainings fit a cluster at once, and on which kind of accelerator; what is said while they run."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import curate.runtime.accelerators as accelerators
import curate.runtime.sweep as sweep
import curate.runtime.train as train
from curate.errors import WorkerError
from curate.runtime.inline import inline
from curate.runtime.session import Pool, Readers, Session
from curate.runtime.sweep import Outcome, Slots, check_outcomes, run_trainings, slots
from curate.training.log import TrainingLog
from curate.training.spec import TrainingSpec


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
        node(CPU=8, GPU=2, **{"accelerator_type:A100": 1.0}),
        node(CPU=8, GPU=4, **{"accelerator_type:H100": 1.0}),
        node(CPU=8, GPU=4, **{"accelerator_type:H100": 1.0}),
        node(alive=False, CPU=64, GPU=64, **{"accelerator_type:A100": 1.0}),
    ]
    monkeypatch.setattr(accelerators.ray, "nodes", lambda: nodes)
    assert slots(session(10, 1.0, 1.0), 1, None) == Slots(8, "H100")
    assert slots(session(10, 1.0, 1.0), 2, None) == Slots(4, "H100")
    assert slots(session(10, 1.0, 1.0), 1, 3) == Slots(3, "H100")
    assert "all trainings run on H100; left idle: A100" in capsys.readouterr().err
    assert slots(session(5, 1.0, 1.0), 1, None) == Slots(5, "H100")  # cluster.workers=5
    assert slots(session(10, 4.0, 1.0), 1, None) == Slots(4, "H100")  # as many as its nodes' processors allow
    # and what is asked of the models afterwards keeps to that kind
    assert accelerators.held_to(Pool(10, 1.0, 2.0), "H100") == Pool(4, 1.0, 2.0)
    assert accelerators.held_to(Pool(10, 1.0, 1.0), None) == Pool(10, 1.0, 1.0)
    assert accelerators.held_to(Pool(10, 1.0, 0.0), "H100") == Pool(10, 1.0, 0.0)


def test_inline_there_is_one():
    with inline():
        assert slots(session(4, 1.0, 0.0), 1, 4) == Slots(1)


def test_a_sweep_of_which_nothing_came_is_an_error():
    check_outcomes({"a": Outcome(None, "TrainingError: nan"), "b": Outcome({})})
    check_outcomes({})
    with pytest.raises(WorkerError, match="all 1 trainings of the sweep failed; the first: TrainingError: nan"):
        check_outcomes({"a": Outcome(None, "TrainingError: nan")})


@dataclass(frozen=True)
class Fake:
    """A training of which only the place, the size and the log matter."""

    url: str
    rows: int
    training: TrainingSpec = field(default_factory=TrainingSpec)
    accelerator: str | None = None


def test_how_far_the_running_trainings_are_is_said_before_they_end(tmp_path: Path, monkeypatch):
    specs = {name: Fake(str(tmp_path / name), rows) for name, rows in {"few": 1, "many": 3, "some": 2}.items()}
    for spec in specs.values():
        line = {"step": 10 * spec.rows, "of": 100, "tokens": 400 * spec.rows, "seconds": 2.0}
        line |= {"flops": 1e9 * spec.rows, "peak": 5e9}
        log = TrainingLog(spec.url, 0)
        log.add(line)
        log.write()
    said: list[str] = []
    heard = threading.Event()

    def say(message: str, **fields: object) -> None:
        said.append(f"{message} {fields}")
        if "under way" in message:
            heard.set()

    def each(items, session, room):
        assert heard.wait(30)
        yield from ((key, None, "TrainingError: nan") for key, _ in items)

    monkeypatch.setattr(train, "EVERY_SECONDS", 0.001)
    monkeypatch.setattr(sweep, "say", say)
    monkeypatch.setattr(sweep, "finished", lambda spec: None)
    monkeypatch.setattr(sweep, "_rows", lambda spec: spec.rows)
    monkeypatch.setattr(sweep, "_each", each)
    found = run_trainings(specs, session(8, 1.0, 0.0), 2)
    assert list(found) == list(specs)
    # Two at once, the largest first; the third has not begun in this run, whatever an earlier one left of it.
    assert said[0] == "sweep: 2 under way, 50/200 of their steps {'rate': '1000 tokens/s', 'peak': '25.0%'}"
