"""The rate limit by a clock of the test's own."""

from __future__ import annotations

import threading

import pytest

from curate.evaluation.pace import Pace


class Clock:
    """Time passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, give_up: threading.Event, seconds: float) -> None:
        with self.lock:
            self.now += seconds


def starts(pace: Pace, clock: Clock, n: int) -> list[float]:
    out = []
    for _ in range(n):
        pace.wait(threading.Event())
        out.append(clock.now)
    return out


@pytest.mark.parametrize("limit", [1, 7, 60, 333])
def test_no_minute_holds_more_than_the_limit(limit):
    clock = Clock()
    found = starts(Pace(limit, clock, clock.sleep), clock, int(4 * limit) + 3)
    for start in found:
        assert sum(start <= t < start + 60.0 - 1e-9 for t in found) <= limit
    assert found[-1] - found[0] == pytest.approx((len(found) - 1) * 60 / limit)  # and no slower than it must be


def test_without_a_limit_nobody_waits():
    clock = Clock()
    assert set(starts(Pace(None, clock, clock.sleep), clock, 1000)) == {100.0}


def test_an_idle_while_is_not_saved_up():
    clock = Clock()
    pace = Pace(60, clock, clock.sleep)
    starts(pace, clock, 1)
    clock.now += 600
    found = starts(pace, clock, 5)
    assert [t - found[0] for t in found] == pytest.approx([0, 1, 2, 3, 4])


@pytest.mark.parametrize("limit", [None, 60])
def test_a_pause_that_the_server_asks_for_holds_for_all(limit):
    clock = Clock()
    pace = Pace(limit, clock, clock.sleep)
    starts(pace, clock, 1)
    pace.hold(30)
    pace.hold(5)  # a shorter one does not end it
    pace.hold(0)
    assert starts(pace, clock, 1) == [130.0]


def test_giving_up_ends_the_wait():
    clock = Clock()
    pace = Pace(1, clock, lambda give_up, seconds: give_up.set())
    give_up = threading.Event()
    pace.wait(give_up)
    assert not give_up.is_set()
    pace.wait(give_up)
    assert give_up.is_set()


def test_threads_share_the_limit():
    clock = Clock()
    pace = Pace(60, clock, clock.sleep)
    found, lock = [], threading.Lock()

    def work() -> None:
        for _ in range(25):
            pace.wait(threading.Event())
            with lock:
                found.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 100
    assert clock.now - 100.0 >= 99.0 - 1e-6  # several sleepers move this clock together, never too little
