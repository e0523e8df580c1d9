"""Streaming through Ray: what a reader yields is what a worker gets, deaths are survived, errors arrive in words."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from curate.errors import ModelError, StorageError, WorkerError
from curate.runtime.session import Pool
from curate.runtime.stream import fetch, map_tasks, put, stream

pytestmark = pytest.mark.usefixtures("running")
POOL = Pool(2, 0.5, 0)


def items(n: int) -> list[bytes]:
    return [json.dumps(i).encode() for i in range(n)]


def three(item: bytes):
    for k in range(3):
        yield json.dumps([json.loads(item), k]).encode()


def echo():
    return lambda item: item


def test_every_chunk_of_every_item_arrives_once():
    found = sorted(json.loads(x) for x in stream(items(7), echo, POOL, three))
    assert found == [[i, k] for i in range(7) for k in range(3)]
    assert sorted(map(json.loads, stream(items(3), echo, POOL))) == [0, 1, 2]
    assert list(stream([], echo, POOL)) == []


def test_a_large_item_is_not_cut():
    big = os.urandom(3 << 20)
    assert list(stream([big], echo, POOL)) == [big]


def waits_for_its_answer(item: bytes):
    answered = Path(json.loads(item))
    yield item
    deadline = time.monotonic() + 120
    while not answered.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield json.dumps("in time" if answered.exists() else "too late").encode()


def answer(item: bytes) -> bytes:
    said = json.loads(item)
    if said not in ("in time", "too late"):
        Path(said).touch()
    return item


def test_a_chunk_is_worked_on_while_its_unit_is_still_being_read(tmp_path):
    """The reader does not read on before its first chunk is answered: a compressed stream may take hours to read."""
    first = json.dumps(str(tmp_path / "answered")).encode()
    assert list(stream([first], lambda: answer, POOL, waits_for_its_answer, chunks=2)) == [first, b'"in time"']


def waits_for_the_first(item: bytes) -> bytes:
    told = Path(json.loads(item))
    deadline = time.monotonic() + 120
    while told.name == "second" and not (told.parent / "first").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return item


def test_an_answer_is_told_before_the_next_one_has_come(tmp_path):
    """A part may take minutes: progress must not lag by one, and an error not wait for another part."""
    pair = [json.dumps(str(tmp_path / name)).encode() for name in ("first", "second")]
    told = []
    for answer in stream(pair, lambda: waits_for_the_first, Pool(2, 0.5, 0)):
        told.append(answer)
        Path(json.loads(answer)).touch()
    assert told == pair


class Reads:
    def __init__(self, ref) -> None:
        self.value = fetch(ref)

    def __call__(self, item: bytes) -> bytes:
        return json.dumps(int(self.value.sum()) + json.loads(item)).encode()


def test_a_broadcast_value_is_read_in_the_constructor():
    import numpy as np

    ref = put(np.arange(10))
    assert sorted(map(json.loads, stream(items(2), partial(Reads, ref), POOL))) == [45, 46]


class DiesOnce:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __call__(self, item: bytes) -> bytes:
        if json.loads(item) == 2 and not self.marker.exists():
            self.marker.touch()
            os._exit(13)
        return item


def test_a_worker_that_dies_is_replaced_and_its_item_done_again(tmp_path):
    found = stream(items(5), partial(DiesOnce, tmp_path / "died"), POOL)
    assert sorted(map(json.loads, found)) == [0, 1, 2, 3, 4]
    assert (tmp_path / "died").exists()


class AlwaysDies:
    def __call__(self, item: bytes) -> bytes:
        os._exit(13)


def test_an_item_that_kills_every_worker_ends_the_stream_in_words():
    with pytest.raises(WorkerError, match=r"died again and again.*cluster\.token_budget.*goes on from there"):
        list(stream(items(1), AlwaysDies, Pool(1, 0.5, 0, restarts=1)))


class CannotStart:
    def __init__(self) -> None:
        raise ModelError("the model 'x' cannot be loaded; give another")


def broken(item: bytes):
    raise StorageError("s3://b/x cannot be read: denied")
    yield b""


class CannotWork:
    def __call__(self, item: bytes) -> bytes:
        raise StorageError("no space left on /x; free some")


class Full:
    def __call__(self, item: bytes) -> bytes:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("make", "read", "kind", "words"),
    [
        (Full, None, WorkerError, r"out of memory \(CUDA out of memory\).*cluster\.token_budget .*goes on from there"),
        (CannotStart, None, ModelError, "the model 'x' cannot be loaded; give another"),
        (CannotWork, None, StorageError, "no space left on /x; free some"),
        (echo, broken, StorageError, "s3://b/x cannot be read: denied"),
    ],
)
def test_errors_of_workers_and_readers_arrive_as_they_are(make, read, kind, words):
    with pytest.raises(kind, match=words):
        list(stream(items(3), make, POOL, read))


class Begins:
    """Notes when it begins an item and when it has ended one.

    With `fails`, whoever is the first of all to begin one ends the stream with it, as soon as another is at work. Which
    item that is Ray decides.
    """

    def __init__(self, place: Path, seconds: float, fails: bool = True) -> None:
        self.place, self.seconds, self.fails = place, seconds, fails

    def __call__(self, item: bytes) -> bytes:
        n = json.loads(item)
        (self.place / f"{n}.begun").write_text(str(os.getpid()))
        if self.fails and self.is_first():
            while len(list(self.place.glob("*.begun"))) < 2:
                time.sleep(0.01)
            raise StorageError("no space left")
        time.sleep(self.seconds)
        (self.place / f"{n}.ended").touch()
        return item

    def is_first(self) -> bool:
        try:
            (self.place / "first").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def listed(place: Path) -> list[str]:
    return sorted(x.name for x in place.iterdir())


def test_an_error_lets_workers_end_what_they_have_begun_and_nothing_happens_after_it(tmp_path):
    with pytest.raises(StorageError, match="no space left"):
        list(stream(items(40), partial(Begins, tmp_path, 1.0), POOL))
    found = listed(tmp_path)
    begun = {x.removesuffix(".begun") for x in found if x.endswith(".begun")}
    ended = {x.removesuffix(".ended") for x in found if x.endswith(".ended")}
    assert 1 <= len(ended) < 30
    assert ended < begun
    assert len(begun - ended) == 1  # the one that failed
    time.sleep(2.5)
    assert listed(tmp_path) == found


def test_a_stream_that_is_left_early_has_no_worker_at_work(tmp_path):
    answers = stream(items(60), partial(Begins, tmp_path, 0.5, fails=False), POOL)
    next(answers)
    answers.close()
    found = listed(tmp_path)
    assert len(found) < 90
    time.sleep(1.5)
    assert listed(tmp_path) == found
    assert len([x for x in found if x.endswith(".begun")]) == len([x for x in found if x.endswith(".ended")])


def test_workers_that_take_too_long_to_end_are_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("curate.runtime.leaving.GRACE_S", 1.0)
    with pytest.raises(StorageError, match="no space left"):
        list(stream(items(3), partial(Begins, tmp_path, 40), POOL))
    assert "waiting for workers" in capsys.readouterr().err
    workers = {int(x.read_text()) for x in tmp_path.glob("*.begun")}
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if psutil.pid_exists(pid)]
    assert not list(tmp_path.glob("*.ended"))


class DiesBeside:
    """The item 0 ends its process whenever it is begun, once another one is at work, which takes some seconds."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __call__(self, item: bytes) -> bytes:
        n = json.loads(item)
        if n == 0:
            while not list(self.place.glob("*.begun")):
                time.sleep(0.01)
            os._exit(13)
        (self.place / f"{n}.begun").touch()
        time.sleep(12)
        (self.place / f"{n}.ended").touch()
        return item


def test_deaths_that_end_a_stream_let_the_others_end_too(tmp_path):
    """Of these Ray Data tells when it has let its actors go."""
    with pytest.raises(WorkerError, match="died again and again"):
        list(stream(items(3), partial(DiesBeside, tmp_path), Pool(2, 0.5, 0, restarts=1)))
    found = listed(tmp_path)
    begun = [x.removesuffix(".begun") for x in found if x.endswith(".begun")]
    assert begun
    assert [x.removesuffix(".ended") for x in found if x.endswith(".ended")] == begun
    time.sleep(1.5)
    assert listed(tmp_path) == found


def test_actors_end_with_their_stream():
    pids = {int(a) for a in stream(items(3), lambda: lambda item: str(os.getpid()).encode(), POOL)}
    assert pids
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_stream_leaves_no_thread_behind():
    list(stream(items(1), echo, POOL))
    before = threading.active_count()
    for make in (echo, CannotWork, echo, CannotWork):
        with suppress(StorageError):
            list(stream(items(3), make, POOL, three))
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threading.active_count() <= before


def double(x: int) -> int:
    if x == 99:
        raise StorageError("99 is too much")
    return 2 * x


def begins_beside(item: tuple[Path, bool]) -> None:
    place, fails = item
    if fails:
        while not list(place.glob("*.begun")):
            time.sleep(0.01)
        raise StorageError("no space left")
    name = place / f"{os.getpid()}.begun"
    name.touch()
    time.sleep(5)
    name.with_suffix(".ended").touch()


def test_an_error_of_a_task_lets_the_others_end(tmp_path):
    with pytest.raises(StorageError, match="no space left"):
        list(map_tasks(begins_beside, [(tmp_path, True), (tmp_path, False)]))
    assert [x.suffix for x in sorted(tmp_path.iterdir())] == [".begun", ".ended"]


def test_tasks_keep_their_order_and_their_errors():
    assert list(map_tasks(double, list(range(40)))) == [2 * i for i in range(40)]
    with pytest.raises(StorageError, match="99 is too much"):
        list(map_tasks(double, [1, 99, 2]))
