"""Streaming through Ray: what a reader yields is what a worker gets, deaths are survived, errors arrive in words."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

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


def test_an_item_that_kills_every_worker_ends_the_stream_in_words(monkeypatch):
    monkeypatch.setattr(Pool, "retries", staticmethod(lambda: {"max_restarts": 1, "max_task_retries": 1}))
    with pytest.raises(WorkerError, match=r"died again and again.*cluster\.token_budget.*goes on from there"):
        list(stream(items(1), AlwaysDies, Pool(1, 0.5, 0)))


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


def double(x: int) -> int:
    if x == 99:
        raise StorageError("99 is too much")
    return 2 * x


def test_tasks_keep_their_order_and_their_errors():
    assert list(map_tasks(double, list(range(40)))) == [2 * i for i in range(40)]
    with pytest.raises(StorageError, match="99 is too much"):
        list(map_tasks(double, [1, 99, 2]))
