"""Status from files alone: places laid out by hand, with modification times that give rates one can work out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.corpus.units import FileEntry, Manifest, Unit
from curate.errors import DriftFound, StorageError
from curate.runtime.output import save_manifest
from curate.runtime.run_note import StageNote, begin, noted, read_notes
from curate.runtime.status import Status, read_status
from curate.runtime.status_stages import rate_of
from jobs.status import text

NOW = 1_800_000_000.0


def at(path: Path, content: bytes | str, when: float) -> Path:
    """A file as it was written at `when`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    os.utime(path, (when, when))
    return path


def manifest(sink: Path, rows: dict[str, int], step: int = 10) -> None:
    files = tuple(FileEntry(k, f"/corpus/{k}", 1, "0", f"digest of {k}", n, ("messages",)) for k, n in rows.items())
    units = tuple(
        Unit(k, f"/corpus/{k}", a, min(a + step, n), step) for k, n in rows.items() for a in range(0, n, step)
    )
    save_manifest(str(sink), Manifest("jsonl", files, units))


def part(place: Path, key: str, start: int, stop: int, when: float, bad: dict[int, str] | None = None) -> None:
    at(place / "parts" / key / f"{start:012d}-{stop:012d}.parquet", b"no reader opens it", when)
    if bad:
        lines = "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in bad.items())
        at(place / "quarantine" / key / f"{start:012d}-{stop:012d}.jsonl", lines, when)


def note(sink: Path, job: str, state: str = "running", updated: float = NOW - 3, **stage: object) -> None:
    base = {"unit": "rows", "already": 0, "done": 0, "tokens": 0, "bad": 0, "place": None, "places": {}}
    stages = [{**base, "marker": None, "began": updated - 500, "ended": None, **stage}] if stage else []
    head = {"run": f"curate-{job}-0", "job": job, "host": "h", "pid": 1, "started": updated - 600, "updated": updated}
    body = {**head, "state": state, "message": "", "stages": stages}
    at(sink / "_status" / f"{job}.json", json.dumps(body), updated)


def only(status: Status):
    ((stage,),) = [r.stages for r in status.runs]
    return stage


@pytest.fixture
def sink(tmp_path) -> Path:
    return tmp_path / "sink"


@pytest.fixture
def half(sink) -> Path:
    """100 rows in two files, of which 50 are done: ten every 20 seconds until 5 seconds ago."""
    manifest(sink, {"a.jsonl": 60, "b/c.jsonl": 40})
    at(sink / "scores" / "recipe.json", json.dumps({"kind": "scores", "fields": {}}), NOW - 200)
    for i, (key, start) in enumerate([("a.jsonl", 0), ("a.jsonl", 20), ("b/c.jsonl", 0), ("a.jsonl", 10)]):
        bad = {start: "no assistant turn", start + 1: "longer than 64 tokens"} if i == 0 else None
        part(sink / "scores", key, start, start + 10, NOW - 85 + 20 * i, bad)
    part(sink / "scores", "b/c.jsonl", 30, 40, NOW - 5, {30: "no assistant turn"})
    return sink


@pytest.mark.parametrize("with_note", [False, True])
def test_half_a_run(half, with_note):
    if with_note:
        note(half, "score", stage="score", total=100, place="./scores")
    found = read_status(str(half), NOW)
    stage = only(found)
    assert found.state == "running"
    assert (stage.done, stage.total, stage.complete, stage.told_by) == (50, 100, False, "parts")
    assert stage.rate == pytest.approx(40 / 80)  # four parts after the first, in 80 seconds
    assert stage.left == pytest.approx(50 / 0.5)
    assert stage.last == NOW - 5
    assert stage.quarantined == 3
    assert stage.reasons == (("no assistant turn", 2), ("longer than 64 tokens", 1))
    said = text(found)
    for word in ("50 of 100 rows", "50%", "0.5/s", "100 s", "3 (6.00%)", "5 s ago", "2 × no assistant turn"):
        assert word in said


def test_quarantine_without_its_part_does_not_count(half):
    """Its writer was killed between the two."""
    at(half / "scores/quarantine/a.jsonl/000000000030-000000000040.jsonl", '{"row": 30, "reason": "x"}\n', NOW)
    assert only(read_status(str(half), NOW)).quarantined == 3


@pytest.mark.parametrize(
    ("updated", "now", "state", "said"),
    [
        (NOW, NOW, "running", "running"),
        (NOW + 900, NOW + 900, "stalled", "no part comes"),
        (NOW, NOW + 900, "silent", "the driver is silent"),
    ],
)
def test_a_run_that_stands_still(half, updated, now, state, said):
    note(half, "score", updated=updated, stage="score", total=100, place="./scores", began=NOW - 100)
    found = read_status(str(half), now, stalled_seconds=600)
    assert found.state == state
    assert said in text(found)


def test_without_a_note_old_parts_are_a_stalled_run(half):
    assert read_status(str(half), NOW + 590).state == "running"
    assert read_status(str(half), NOW + 700).state == "stalled"


@pytest.mark.parametrize(("rows", "done", "state"), [(30, 30, "complete"), (70, 40, "incomplete")])
def test_the_scope_of_a_run_is_what_counts(half, rows, done, state):
    """source.max_rows: the first rows of the corpus, file after file; parts of an earlier, longer run do not count."""
    note(half, "score", "done", stage="score", total=rows, place="./scores")
    found = read_status(str(half), NOW)
    assert (only(found).done, found.state) == (done, state)


def test_parts_that_were_removed_after_the_end_are_missed(half):
    note(half, "score", "done", stage="score", total=100, place="./scores")
    assert read_status(str(half), NOW).state == "incomplete"


def test_failed_and_superseded(half):
    note(half, "score", "failed", stage="score", total=30, place="./scores")
    assert read_status(str(half), NOW).state == "failed"
    later = {"stage": "score", "total": 30, "place": "./scores"}
    note(half, "run", "done", NOW + 60, **later)
    found = read_status(str(half), NOW + 70)
    assert (found.state, [r.job for r in found.runs]) == ("complete", ["run"])


def test_selection_by_its_ledgers(half):
    at(half / "ledger" / "a.jsonl.parquet", b"", NOW)
    note(half, "select", stage="select", total=100, done=60)
    stage = only(read_status(str(half), NOW))
    assert (stage.done, stage.total, stage.told_by) == (60, 100, "files")


def test_a_sweep_by_its_markers(sink, tmp_path):
    places = {f"arm {i}": str(tmp_path / "store" / "trainings" / f"{i}") for i in range(5)}
    for i in range(3):
        at(Path(places[f"arm {i}"]) / "done.json", "{}", NOW - 100 + 30 * i)
    log = [{"step": 5, "of": 40}, {"step": 12, "of": 40}]
    at(Path(places["arm 3"]) / "log.jsonl", "".join(json.dumps(x) + "\n" for x in log), NOW - 7)
    note(sink, "retrain", stage="sweep", total=5, unit="trainings", places=places, marker="done.json")
    stage = only(read_status(str(sink), NOW))
    assert (stage.done, stage.total, stage.last) == (3, 5, NOW - 7)
    assert stage.rate == pytest.approx(2 / 60)
    assert stage.detail == "under way: arm 3 12/40 steps"


def test_audits(sink):
    for name in ("000001", "000002"):
        at(sink / "audits" / name / "plan.json", "{}", NOW)
        manifest(sink / "audits" / name, {"a.jsonl": 20})
    at(sink / "audits/000001/committed.json", "{}", NOW)  # retention has removed its scores
    part(sink / "audits/000002/scores", "a.jsonl", 0, 10, NOW - 5)
    found = read_status(str(sink), NOW)
    audits, under_way = found.runs[0].stages
    assert (audits.done, audits.total, audits.detail) == (1, 2, "begun: 000002")
    assert (under_way.stage, under_way.done, under_way.total) == ("audit 000002", 10, 20)
    assert found.state == "running"
    at(sink / "audits/000002/committed.json", "{}", NOW)
    assert read_status(str(sink), NOW).state == "complete"


def test_a_store_and_its_products(tmp_path):
    store = tmp_path / "store"
    at(store / "factors" / "d1" / "factors.json", "{}", NOW)
    at(store / "factors" / "d1" / "recipe.json", json.dumps({"kind": "factors", "fields": {}}), NOW)
    at(store / "factors" / "d2" / "recipe.json", json.dumps({"kind": "factors", "fields": {}}), NOW)
    for i in range(3):
        at(store / "factors" / "d2" / "work" / "p" / "covariance" / f"{i}.safetensors", b"", NOW)
    part(store / "generations" / "g", "a.jsonl", 0, 10, NOW)
    stages = {s.stage: s for s in read_status(str(store), NOW).runs[0].stages}
    assert (stages["factors"].done, stages["factors"].total) == (1, 2)
    assert "10 rows in parts" in stages["generations"].detail
    assert read_status(str(store / "factors" / "d1"), NOW).state == "complete"
    fit = only(read_status(str(store / "factors" / "d2"), NOW))
    assert (fit.complete, fit.detail) == (False, "under way: factors (3 covariance)")


def test_nothing_there(tmp_path):
    with pytest.raises(StorageError, match="nothing of curate's is at"):
        read_status(str(tmp_path / "none"), NOW)


def test_a_broken_note_is_named(half):
    at(half / "_status" / "score.json", "{", NOW)
    with pytest.raises(StorageError, match=r"_status/score\.json cannot be read"):
        read_status(str(half), NOW)


@pytest.mark.parametrize(
    ("commits", "rate"),
    [
        ([], None),
        ([(NOW, 5)], None),
        ([(None, 5), (None, 5)], None),
        ([(NOW, 4), (NOW - 10, 100), (NOW - 4, 2)], 0.6),
        ([(NOW - 90_000, 100), (NOW - 20, 100), (NOW, 30)], 1.5),  # it lay still for a day
    ],
)
def test_rates(commits, rate):
    assert rate_of(commits)[0] == (None if rate is None else pytest.approx(rate))


# the notes themselves


def test_how_a_block_ends_is_in_the_note(sink):
    def work() -> None:
        with noted(str(sink), "score", "curate-score-1", {"store": "s"}):
            assert not read_notes(str(sink))  # nothing has begun
            begin(StageNote("score", 10, "rows", place=f"{sink}/scores"))
            (running,) = read_notes(str(sink))
            assert (running["state"], running["pid"]) == ("running", os.getpid())
            raise StorageError("the disk is full")

    with pytest.raises(StorageError, match="full"):
        work()
    (ended,) = read_notes(str(sink))
    assert (ended["state"], ended["message"], ended["store"]) == ("failed", "the disk is full", "s")
    assert ended["stages"][0]["place"] == "./scores"
    with noted(str(sink), "score", "curate-score-1", {}):
        begin(StageNote("score", 10, "rows"))
    assert [n["state"] for n in read_notes(str(sink))] == ["done"]


def test_an_audit_that_found_drift_is_done(sink):
    def work() -> None:
        with noted(str(sink), "audit", "curate-audit-1", {}):
            begin(StageNote("score", 10, "rows"))
            raise DriftFound("psi 0.4 > 0.2")

    with pytest.raises(DriftFound):
        work()
    (ended,) = read_notes(str(sink))
    assert (ended["state"], ended["message"]) == ("done", "psi 0.4 > 0.2")


def test_a_run_that_is_refused_leaves_no_note(sink):
    with pytest.raises(StorageError), noted(str(sink), "score", "curate-score-1", {}):
        raise StorageError("no")
    assert not sink.exists()


def test_what_a_killed_run_left_of_a_note_goes(sink):
    left = at(sink / "_status" / ".score.json.0123456789abcdef.tmp", "{", NOW)
    with noted(str(sink), "score", "curate-score-1", {}):
        begin(StageNote("score", 10, "rows"))
    assert not left.exists()


def test_a_note_that_cannot_be_written_does_not_end_the_job(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with noted(str(blocked), "score", "curate-score-1", {}):
        begin(StageNote("score", 10, "rows"))
    assert capsys.readouterr().err.count("WARNING: `curate status` will not see this run") == 1


# as a command


def command(*given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs.cli", "status", *given], capture_output=True, text=True)


def test_the_command_its_exit_status_and_what_it_loads(half, tmp_path):
    done = command(str(half), "--json")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["runs"][0]["stages"][0]["done"] == 50
    for key, start in (("a.jsonl", 30), ("a.jsonl", 40), ("a.jsonl", 50), ("b/c.jsonl", 10), ("b/c.jsonl", 20)):
        part(half / "scores", key, start, start + 10, NOW)
    pq.write_table(pa.table({"x": [1]}), half / "unrelated.parquet")
    code = "import sys; sys.argv[1:] = sys.argv[1:]; import jobs.status, atexit\n"
    code += "atexit.register(lambda: print(sorted({'ray', 'torch', 'transformers', 'hydra'} & set(sys.modules))))\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "jobs.status.main()", str(half)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "100 of 100 rows" in done.stdout
    assert done.stdout.endswith("[]\n")
    assert command(str(tmp_path / "none")).returncode == 2
