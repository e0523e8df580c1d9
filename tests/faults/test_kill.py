"""SIGKILL in the middle of a scoring run: the same command goes on, and the parts equal those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bench.watched import COUNTING
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import command, inline, options, parts, run_job

ROWS, UNIT, WORKERS = 400, 10, 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus_url(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "corpus"
    write_jsonl(folder / "a.jsonl", [conversation(i) for i in range(ROWS)])
    return folder


@pytest.fixture(scope="module")
def run_options(corpus_url, model):
    def make(sink: Path) -> list[str]:
        more = {"cluster.cpus": 2, "cluster.workers": WORKERS, "cluster.object_store_gb": 0.2, "source.unit_rows": UNIT}
        return options(corpus_url, model, sink, **more)

    return make


@pytest.fixture(scope="module")
def undisturbed(run_options, tmp_path_factory) -> dict:
    sink = tmp_path_factory.mktemp("undisturbed")
    run_job("score", inline(run_options(sink)))
    return parts(sink)


def wait_for_parts(sink: Path, n: int, process, seconds: float = 240) -> int:
    """Until `n` parts are committed; polls, as there is nothing else to wait on from outside."""
    root, end = sink / "scores" / "parts", time.monotonic() + seconds
    while time.monotonic() < end:
        found = len(list(root.rglob("*.parquet"))) if root.exists() else 0
        if found >= n:
            return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError(f"only {found} parts after {seconds} s")


def family(pid: int) -> list[psutil.Process]:
    """All processes of a run but Ray's two agents, which write nothing of ours and need a minute to notice."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if "Agent" not in process.name() + "".join(process.cmdline()):
                found.append(process)
    return found


def assert_all_gone(processes: list[psutil.Process], seconds: float = 60) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, [p.cmdline() for p in alive if p.is_running()]


def assert_same(sink: Path, undisturbed: dict) -> None:
    found = parts(sink)
    assert found.keys() == undisturbed.keys()
    assert all(found[n].equals(undisturbed[n]) for n in found)


@pytest.fixture
def scored(tmp_path, monkeypatch) -> Path:
    """A file to which every process of a run adds the rows that it has scored, whether they were committed or not."""
    log = tmp_path / "scored"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(COUNTING.format(log=str(log)))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *([before] if before else [])]))
    return log


def test_the_driver_is_killed_halfway(run_options, undisturbed, tmp_path, scored, capsys):
    sink = tmp_path / "out"
    process = command("score", run_options(sink))
    wait_for_parts(sink, len(undisturbed) // 2, process)
    relatives = family(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    process.stderr.close()
    assert_all_gone(relatives)  # no orphan goes on writing
    left = parts(sink)
    assert 0 < len(left) < len(undisturbed), "the kill came too late to test anything"

    again = command("score", run_options(sink))
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    done = sum(t.num_rows for t in left.values())
    assert f"rows_done={done} rows_left={ROWS - done}" in err
    assert_same(sink, undisturbed)
    assert not list(sink.rglob("*.tmp"))  # what the killed writers left half done is gone

    times = Counter(scored.read_text().split())
    assert len(times) == ROWS
    twice = sum(n - 1 for n in times.values())
    assert twice <= WORKERS * UNIT, f"{twice} rows were scored twice"
    with capsys.disabled():
        print(f"\n{twice} of {ROWS} rows were scored twice after the kill (at most {WORKERS * UNIT} may be)")


def test_a_scoring_actor_is_killed(run_options, undisturbed, tmp_path):
    process = command("score", run_options(tmp_path))
    wait_for_parts(tmp_path, 3, process)
    actors = [p for p in family(process.pid) if any("MapWorker" in part for part in p.cmdline())]
    assert actors
    actors[0].kill()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same(tmp_path, undisturbed)


@pytest.mark.full
def test_interrupt_by_the_user_says_how_to_go_on(run_options, undisturbed, tmp_path):
    process = command("score", run_options(tmp_path))
    wait_for_parts(tmp_path, 3, process)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again to go on" in err
    again = command("score", run_options(tmp_path))
    assert again.wait(timeout=300) == 0
    again.communicate()
    assert_same(tmp_path, undisturbed)
