"""Crews: states live through rounds, deaths are survived, errors arrive in words."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from curate.errors import CurvatureError, ModelError, WorkerError
from curate.runtime.crew import Crew
from curate.runtime.inline import inline
from curate.runtime.session import Pool

POOL = Pool(2, 0.5, 0)


class Counter:
    def __init__(self) -> None:
        self.calls = 0


def square(state: Counter, x: int) -> tuple[int, int, int]:
    state.calls += 1
    if x == 99:
        raise CurvatureError("99 is too much")
    return os.getpid(), state.calls, x * x


def die_once(state: Counter, marker: Path) -> int:
    state.calls += 1
    if not marker.exists():
        marker.touch()
        os._exit(13)
    return state.calls


def die_of_two(state: Counter, x: int) -> int:
    if x == 2:
        os._exit(13)
    return x


def die_of_odd(state: Counter, x: int) -> int:
    if x % 2:
        os._exit(13)
    return x


def die(state: Counter, item: None) -> None:
    os._exit(13)


def fill(state: Counter, item: None) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def fail_beside(state: Counter, item: tuple[Path, float]) -> None:
    """The first to begin raises when another is at work, which takes so many seconds."""
    place, seconds = item
    (place / f"{os.getpid()}-{state.calls}.begun").touch()
    state.calls += 1
    try:
        (place / "first").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(seconds)
        (place / f"{os.getpid()}.ended").touch()
        return
    while len(list(place.glob("*.begun"))) < 2:
        time.sleep(0.01)
    raise CurvatureError("singular")


def broken() -> Counter:
    raise ModelError("the model 'x' cannot be loaded; give another")


def test_states_live_through_rounds_and_come_back_after_a_death(running, tmp_path):
    with Crew(Counter, POOL) as crew:
        assert list(crew.map(square, [])) == []
        first = list(crew.map(square, [0]))
        assert len({pid for pid, _, _ in first}) == 1  # one item, one actor
        second = list(crew.map(square, list(range(20))))
        assert sorted(x for _, _, x in second) == [i * i for i in range(20)]
        assert max(n for _, n, _ in [*first, *second]) > 1
        assert list(crew.map(die_once, [tmp_path / "a", tmp_path / "b"])) == [1, 1]  # of new states
        with pytest.raises(CurvatureError, match="99 is too much"):
            list(crew.map(square, [1, 99, 2]))
        with pytest.raises(WorkerError, match=r"out of memory \(CUDA out of memory\).*gradient_token_budget"):
            list(crew.map(fill, [None]))
        assert sorted(x for _, _, x in crew.map(square, [5])) == [25]  # an error does not end the crew


def test_what_cannot_start_or_always_dies_is_said_in_words(running):
    with Crew(broken, POOL) as crew, pytest.raises(ModelError, match="'x' cannot be loaded; give another"):
        list(crew.map(square, [1]))
    with Crew(Counter, Pool(1, 0.5, 0, restarts=1)) as crew, pytest.raises(WorkerError, match=r"died again and again"):
        list(crew.map(die, [None]))


def test_an_item_that_kills_its_actors_may_have_another_answer(running, monkeypatch):
    monkeypatch.setattr("curate.runtime.crew.TRIES", 2)
    with Crew(Counter, Pool(1, 0.5, 0)) as crew:
        found = list(crew.map(die_of_two, [1, 2, 3], lambda x, error: (x, type(error).__name__)))
    assert found == [1, (2, "WorkerError"), 3]


def test_items_that_use_up_an_actor_s_starts_cost_no_other_item(running, monkeypatch):
    monkeypatch.setattr("curate.runtime.crew.TRIES", 2)
    with Crew(Counter, Pool(1, 0.5, 0, restarts=2)) as crew:
        found = list(crew.map(die_of_odd, list(range(8)), lambda x, error: -x))
        assert found == [0, -1, 2, -3, 4, -5, 6, -7]
        assert list(crew.map(die_of_odd, [2, 4])) == [2, 4]


def test_inline_there_is_one_state_here():
    with inline(), Crew(Counter, POOL) as crew:
        assert list(crew.map(square, [2, 3])) == [(os.getpid(), 1, 4), (os.getpid(), 2, 9)]
        assert list(crew.map(square, [4])) == [(os.getpid(), 3, 16)]


def test_an_error_lets_the_others_end_what_they_have_begun(running, tmp_path):
    with Crew(Counter, POOL) as crew, pytest.raises(CurvatureError, match="singular"):
        list(crew.map(fail_beside, [(tmp_path, 10.0)] * 6))
    assert len(list(tmp_path.glob("*.begun"))) == 2
    assert len(list(tmp_path.glob("*.ended"))) == 1


def test_those_that_take_too_long_are_killed(running, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("curate.runtime.leaving.GRACE_S", 1.0)
    with Crew(Counter, POOL) as crew, pytest.raises(CurvatureError, match="singular"):
        list(crew.map(fail_beside, [(tmp_path, 60.0)] * 6))
    assert "waiting for workers" in capsys.readouterr().err
    workers = [int(x.stem.split("-")[0]) for x in tmp_path.glob("*.begun")]
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if psutil.pid_exists(pid)]
    assert not list(tmp_path.glob("*.ended"))
