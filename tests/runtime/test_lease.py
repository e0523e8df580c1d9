"""Leases: one owner at a time, renewed while it works, taken over when it has died, given back."""

from __future__ import annotations

import json
import threading

import pytest

from curate.errors import LeaseError
from curate.runtime.lease import Holder, Lease


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def url(tmp_path) -> str:
    return str(tmp_path / "audits" / "lease.json")


def holder(url: str) -> dict:
    with open(url) as f:
        return json.load(f)


def test_a_second_owner_is_told_who_the_first_is(url):
    with Lease(url, 300):
        first = holder(url)
        with pytest.raises(LeaseError, match=rf"held by process {first['pid']} on '{first['host']}'"):
            Lease(url, 300).__enter__()
        assert holder(url) == first  # and nothing of his was touched
    with Lease(url, 300):
        assert holder(url)["owner"] != first["owner"]


def test_it_is_given_back_on_an_error_too(url, tmp_path):
    with pytest.raises(ZeroDivisionError), Lease(url, 300):
        raise ZeroDivisionError
    assert not (tmp_path / "audits" / "lease.json").exists()


def test_a_stale_lease_is_taken_over_with_a_word(url, capsys):
    clock = Clock()
    dead = Lease(url, 60, clock=clock)
    assert dead._try() is None  # taken, by a process that then died
    clock.now += 59
    with pytest.raises(LeaseError, match=r"renewed 59 s ago.*the lease is free in 1 s"):
        Lease(url, 60, clock=clock).__enter__()
    clock.now += 2
    with Lease(url, 60, clock=clock):
        assert "took over a stale lease" in capsys.readouterr().err
        with pytest.raises(LeaseError, match="taken over by another audit"):
            dead.check()  # had it only slept, it would not commit


def test_a_stale_lease_that_nobody_took_is_still_its_owner_s(url):
    clock = Clock()
    slept = Lease(url, 60, clock=clock)
    assert slept._try() is None
    clock.now += 1000
    slept.check()
    assert holder(url)["owner"] == slept._mine.owner
    assert holder(url)["renewed"] == clock.now


def test_of_many_takers_of_a_stale_lease_one_gets_it(url):
    clock = Clock()
    assert Lease(url, 1, clock=clock)._try() is None
    clock.now += 5
    takers = [Lease(url, 1, clock=clock) for _ in range(6)]
    barrier, got = threading.Barrier(6), []

    def take(lease: Lease) -> None:
        barrier.wait()
        if lease._try() is None:
            got.append(lease)

    threads = [threading.Thread(target=take, args=(t,)) for t in takers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 1
    assert holder(url)["owner"] == got[0]._mine.owner


def test_it_is_renewed_while_its_owner_works(url):
    with Lease(url, 3) as lease:
        began = holder(url)["renewed"]
        while holder(url)["renewed"] == began:  # the thread writes four times within the lease
            lease.check()
        assert holder(url)["owner"] == lease._mine.owner


def test_an_owner_that_was_taken_over_is_told_and_leaves_the_other_alone(url):
    with Lease(url, 1) as lease:
        other = Holder("other", "elsewhere", 1, 0.0, 2e9, 1.0)
        while True:  # the renewing thread writes at the same time
            with open(url, "wb") as f:
                f.write(other.to_bytes())
            lease._thread.join(timeout=2)
            if not lease._thread.is_alive():
                break
        with pytest.raises(LeaseError, match="taken over by another audit"):
            lease.check()
    assert holder(url)["owner"] == "other"


def test_waiting_ends_when_the_other_is_done(url, capsys):
    first = Lease(url, 6)
    first.__enter__()

    def second() -> None:
        with Lease(url, 6, wait=True):
            pass

    waiting = threading.Thread(target=second)
    waiting.start()
    while "waiting for the lease" not in capsys.readouterr().err:
        assert waiting.is_alive()
    first.__exit__(None, None, None)
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_a_file_that_is_no_lease_is_replaced(url, tmp_path):
    (tmp_path / "audits").mkdir()
    (tmp_path / "audits" / "lease.json").write_text("{}")
    with Lease(url, 60):
        assert holder(url)["owner"]
