"""Compare and swap: of many writers one wins, locally, in memory and on S3."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from connectors import exchange
from tests.s3_server import serve


@pytest.fixture(scope="module")
def endpoint():
    with serve() as found:
        yield found


def behaves(url: str) -> None:
    assert exchange.read(url) is None
    assert not exchange.swap(url, b"other", b"mine")
    assert exchange.swap(url, None, b"mine")
    assert not exchange.swap(url, None, b"yours")
    assert not exchange.swap(url, b"other", b"yours")
    assert exchange.read(url) == b"mine"
    assert exchange.swap(url, b"mine", b"again")
    assert exchange.read(url) == b"again"
    assert not exchange.swap(url, b"mine", None)
    assert exchange.swap(url, b"again", None)
    assert exchange.read(url) is None


def one_wins(url: str, writers: int = 8) -> None:
    for before in (None, b"old"):
        if before is not None:
            exchange.swap(url, exchange.read(url), before)
        with ThreadPoolExecutor(writers) as pool:
            names = [f"writer {i}".encode() for i in range(writers)]
            won = list(pool.map(exchange.swap, [url] * writers, [before] * writers, names))
        assert sum(won) == 1
        assert exchange.read(url) == f"writer {won.index(True)}".encode()


def test_on_local_disk(tmp_path):
    behaves(str(tmp_path / "deep" / "lease.json"))
    one_wins(str(tmp_path / "lease.json"))
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["deep", "lease.json"]


def test_in_memory():
    behaves("memory://exchange/lease.json")


@pytest.mark.slow
def test_on_s3_by_conditional_writes(endpoint, monkeypatch):
    endpoint.use(monkeypatch)
    bucket = endpoint.bucket("exchange")
    monkeypatch.setattr(exchange, "_plain", None)  # S3 does not fall back (but to remove)
    url = f"{bucket}/a/lease.json"
    assert exchange.swap(url, None, b"mine")
    assert not exchange.swap(url, None, b"yours")
    assert not exchange.swap(url, b"other", b"yours")
    assert exchange.swap(url, b"mine", b"again")
    assert exchange.read(url) == b"again"
    monkeypatch.undo()
    endpoint.use(monkeypatch)
    behaves(f"{bucket}/b/lease.json")
    one_wins(f"{bucket}/c/lease.json")
