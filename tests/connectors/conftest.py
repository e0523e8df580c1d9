from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.s3_server import Endpoint, serve

_COUNT = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[Endpoint]:
    with serve() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new, empty bucket; this process and its children reach it."""
    s3_endpoint.use(monkeypatch)
    return s3_endpoint.bucket(f"bucket-{next(_COUNT)}")


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty folder in each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "place")
    if request.param == "memory":
        return f"memory://place-{next(_COUNT)}"
    return f"{request.getfixturevalue('s3')}/place"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no right to mount a file system here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def in_child(act: Callable[[], object], limit: Callable[[], object] = lambda: None) -> str:
    """What `act` returns or raises, as text, in a forked process that has called `limit` first; "" if it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        answer = ""
        try:
            limit()
            answer = str(act())
        except Exception as e:  # noqa: BLE001  # told to the parent
            answer = f"{type(e).__name__}: {e}"
        finally:
            os.write(write, answer.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        answer = f.read().decode()
    os.waitpid(child, 0)
    return answer
