"""Temporary folders: gone at the end of the block, and after a kill with the next one; a live one is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from curate.training.scratch import remove_dead, scratch

HOLD = "from curate.training.scratch import scratch\nwith scratch('x') as f:\n    print(f, flush=True)\n    input()\n"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(folder: Path) -> None:
    os.utime(folder, (1, 1))


def test_a_folder_ends_with_its_block(place):
    with scratch("rows") as folder:
        (folder / "file").write_text("x")
        age(folder)
        assert remove_dead(place) == 0  # this process lives
        assert (folder / "file").exists()
    assert list(place.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(place):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )
    left = Path(process.stdout.readline().strip())
    assert left.parent == place
    age(left)
    assert remove_dead(place) == 0
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    new = place / "curate-training-rows-new"  # made this moment, not locked yet
    new.mkdir()
    with scratch("rows"):
        assert not left.exists()
        assert new.exists()
