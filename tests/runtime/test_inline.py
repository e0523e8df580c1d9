"""Inline runs: the same items, answers and errors as a cluster's, in this process and without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from curate.errors import CorpusError
from curate.runtime.cluster import ClusterSpec
from curate.runtime.inline import is_inline
from curate.runtime.session import session
from curate.runtime.stream import fetch, map_tasks, put, stream


def read_two(item: bytes):
    yield item + b".0"
    yield item + b".1"


def test_every_chunk_is_answered_by_one_worker_in_order():
    made = []

    def make():
        made.append(os.getpid())
        return lambda item: item.upper()

    with session(ClusterSpec(address="inline", cpus=1)) as running:
        answers = list(stream([b"a", b"b"], make, running.scorers, read_two, running.readers))
        assert fetch(put({"a": made})) == {"a": made}  # nothing is copied
        assert list(map_tasks(len, ["x", "yy"])) == [1, 2]
        assert list(stream([], make, running.scorers)) == []
    assert answers == [b"A.0", b"A.1", b"B.0", b"B.1"]
    assert made == [os.getpid()]
    assert not is_inline()


def test_an_error_is_raised_where_it_happens():
    def fail(item: bytes) -> bytes:
        raise CorpusError(f"bad item {item!r}")

    with session(ClusterSpec(address="inline")) as running:
        with pytest.raises(CorpusError, match="bad item b'x'") as caught:
            list(stream([b"x"], lambda: fail, running.scorers))
    assert any(entry.name == "fail" for entry in caught.traceback)  # a debugger stops in the method itself
    assert not is_inline()


def test_ray_is_not_started():
    code = (
        "import ray\n"
        "from curate.runtime.cluster import ClusterSpec\n"
        "from curate.runtime.progress import Progress\n"
        "from curate.runtime.session import session\n"
        "with session(ClusterSpec(address='inline')):\n"
        "    Progress('x', 1).add(1, 1, 1)\n"
        "    assert not ray.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
