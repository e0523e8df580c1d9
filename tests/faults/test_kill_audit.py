"""SIGKILL in the middle of an audit: once its lease is stale the same command goes on, and finds what an undisturbed
audit finds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import write_jsonl
from tests.jobs.auditing import arrival, audit_options, history, last_line, scored
from tests.jobs.helpers import command, inline, run_job

ROWS, UNIT = 400, 10
pytestmark = pytest.mark.slow


def committed_parts(sink: Path) -> dict[str, int]:
    """Names of the parts, with the times at which they were written."""
    root = sink / "audits" / "000001" / "scores" / "parts"
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*.parquet")}


def wait_for_parts(sink: Path, n: int, process, seconds: float = 240) -> None:
    """Until `n` parts are committed; polls, as there is nothing else to wait on from outside."""
    end = time.monotonic() + seconds
    while len(committed_parts(sink)) < n:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"only {len(committed_parts(sink))} parts after {seconds} s"
        time.sleep(0.002)


def test_a_killed_audit_goes_on_when_its_lease_is_stale(model, tmp_path, capsys):
    corpus, sink = tmp_path / "arrivals", tmp_path / "out"
    write_jsonl(corpus / "a.jsonl", [arrival(i) for i in range(ROWS)])
    how = {"audit.lease_seconds": 4, "audit.locked": "wait"}
    given = inline(audit_options(corpus, model, sink, **how))  # of actors that die with the driver see test_kill
    process = command("audit", given)
    wait_for_parts(sink, ROWS // UNIT // 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = committed_parts(sink)
    assert 0 < len(left) < ROWS // UNIT, "the kill came too late to test anything"
    assert not list(sink.rglob("committed.json"))
    assert (sink / "audits" / "lease.json").exists()

    write_jsonl(corpus / "b.jsonl", [arrival(i) for i in range(ROWS, ROWS + 20)])  # what came meanwhile goes with it
    again = command("audit", given)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "took over a stale lease" in err
    assert "going on where a killed run stopped" in err
    assert f'"rows": {ROWS + 20}' in out.splitlines()[-1]
    assert {n: committed_parts(sink)[n] for n in left} == left  # what was done was not done again
    assert not (sink / "audits" / "lease.json").exists()
    assert not list(sink.rglob("*.tmp"))

    run_job("audit", inline(audit_options(corpus, model, tmp_path / "undisturbed")))
    assert last_line(capsys)["rows"] == ROWS + 20
    expected = scored(tmp_path / "undisturbed", "000001")
    found = scored(sink, "000001")
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        assert found[name] == pytest.approx(scores, rel=1e-4, abs=1e-6)
    a, b = history(sink), history(tmp_path / "undisturbed")
    assert [(r["source"], r["column"], r["rows"]) for r in a] == [(r["source"], r["column"], r["rows"]) for r in b]
    assert pq.read_table(sink / "audits" / "000001" / "manifest.parquet").num_rows == (ROWS + 20) // UNIT
