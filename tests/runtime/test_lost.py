"""A lost device or engine takes its actor with it, and another goes on; one that fails at once again is told of."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from curate.errors import EngineDead, EngineGone, WorkerError
from curate.runtime.crew import Crew
from curate.runtime.inline import inline
from curate.runtime.session import Pool
from curate.runtime.stream import stream

ONE = Pool(1, 0.5, 0)


class Fails:
    """Notes each start in `place`; raises at the item 2: at the first `times` starts, or at all."""

    def __init__(self, place: Path, error: Exception, times: int = 99) -> None:
        self.error, self.start = error, len(list(place.iterdir()))
        (place / f"{self.start}").touch()
        self.times = times

    def __call__(self, item: bytes) -> bytes:
        if json.loads(item) == 2 and self.start < self.times:
            raise self.error
        return item


ITEMS = [json.dumps(i).encode() for i in range(5)]


def starts(place: Path) -> int:
    return len(list(place.iterdir()))


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("error", [EngineDead("no room"), torch.AcceleratorError("CUDA error: lost"), EngineGone("?")])
def test_another_actor_goes_on(tmp_path, error):
    assert sorted(stream(ITEMS, partial(Fails, tmp_path, error, 1), ONE)) == sorted(ITEMS)
    assert starts(tmp_path) == 2


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("error", [EngineGone("?"), torch.AcceleratorError("CUDA error: lost")])
def test_a_killed_engine_and_a_lost_device_are_replaced_again_and_again(tmp_path, error):
    assert sorted(stream(ITEMS, partial(Fails, tmp_path, error, 4), ONE)) == sorted(ITEMS)
    assert starts(tmp_path) == 5


@pytest.mark.usefixtures("running")
def test_an_engine_that_fails_at_once_in_the_new_actor_too_ends_the_stream_with_its_reason(tmp_path):
    """Each start of an engine may take minutes, and ten more of them would not help."""
    error = EngineDead("vLLM failed: head_dim=8 is not supported")
    with pytest.raises(EngineDead, match="head_dim=8 is not supported"):
        list(stream([b"2", b"2", b"2"], partial(Fails, tmp_path, error), ONE))
    assert starts(tmp_path) == 2


class CannotBegin:
    def __init__(self, place: Path, times: int) -> None:
        start = len(list(place.iterdir()))
        (place / f"{start}").touch()
        if start < times:
            raise torch.AcceleratorError("CUDA error: lost")

    def __call__(self, item: bytes) -> bytes:
        return item


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("how", ["stream", "crew"])
def test_a_device_that_is_lost_before_the_first_thing_is_replaced_once(tmp_path, how):
    def run(place: Path, times: int) -> list[bytes]:
        place.mkdir()
        if how == "stream":
            return sorted(stream(ITEMS, partial(CannotBegin, place, times), ONE))
        with Crew(partial(CannotBegin, place, times), ONE) as crew:
            return sorted(crew.map(work, ITEMS))

    assert run(tmp_path / "once", 1) == sorted(ITEMS)
    assert starts(tmp_path / "once") == 2
    with pytest.raises(WorkerError, match=r"device has failed \(CUDA error: lost\).*nvidia-smi"):
        run(tmp_path / "always", 99)
    assert starts(tmp_path / "always") == 2


def work(state: Fails, item: bytes) -> bytes:
    return state(item)


@pytest.mark.usefixtures("running")
def test_the_same_in_a_crew(tmp_path):
    (once := tmp_path / "once").mkdir()
    with Crew(partial(Fails, once, EngineDead("no room"), 1), ONE) as crew:
        assert sorted(crew.map(work, ITEMS)) == sorted(ITEMS)
    assert starts(once) == 2
    (always := tmp_path / "always").mkdir()
    with Crew(partial(Fails, always, EngineDead("no room")), ONE) as crew, pytest.raises(EngineDead, match="no room"):
        list(crew.map(work, ITEMS))
    assert starts(always) == 2
    # A sweep goes on without the training whose device fails, and in a process that is sound.
    (sweep := tmp_path / "sweep").mkdir()
    with Crew(partial(Fails, sweep, torch.AcceleratorError("CUDA error: lost")), ONE) as crew:
        found = list(crew.map(work, ITEMS, lambda item, error: item + b" lost"))
    assert sorted(found) == sorted([ITEMS[0], ITEMS[1], b"2 lost", *ITEMS[3:]])
    assert starts(sweep) > 2


def test_inline_nobody_is_replaced_and_all_is_told(tmp_path):
    for error, kind in ((EngineDead("no room"), EngineDead), (torch.AcceleratorError("CUDA error: lost"), WorkerError)):
        with inline(), pytest.raises(kind, match=str(error)):
            list(stream(ITEMS, partial(Fails, tmp_path, error), ONE))
        with inline(), Crew(partial(Fails, tmp_path, error), ONE) as crew, pytest.raises(kind, match=str(error)):
            list(crew.map(work, ITEMS))
