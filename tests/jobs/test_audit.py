"""Audits of a corpus that grows day by day. Oracles: PSI and KS by their definitions, from the score parts."""

from __future__ import annotations

import bisect
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from connectors import storage
from curate.errors import ConfigError, CurateError, DriftFound, LeaseError, RecipeError
from curate.runtime.lease import Lease
from tests.conftest import write_jsonl
from tests.jobs.auditing import arrival, audit, audit_options, column, day, history, last_line, scored, summary
from tests.jobs.helpers import options, run_job

pytestmark = pytest.mark.usefixtures("here")
COLUMN = "vector_filter.test.L2"


@pytest.fixture
def place(model, tmp_path):
    """(corpus, model, sink), as `audit` takes them."""
    return tmp_path / "arrivals", model, tmp_path / "out"


def ids(sink: Path, name: str) -> set[str]:
    return set(scored(sink, name))


def names(*rows: int) -> set[str]:
    return {f"r{i}" for i in rows}


def psi_by_hand(new: np.ndarray, base: np.ndarray) -> float:
    """Ten bins of equal share of the baseline; half a row added to each."""
    cuts = sorted({float(np.quantile(base, k / 10)) for k in range(1, 10)})
    total = 0.0
    for b in range(len(cuts) + 1):
        p = (sum(bisect.bisect_right(cuts, x) == b for x in new) + 0.5) / (len(new) + 0.5 * (len(cuts) + 1))
        q = (sum(bisect.bisect_right(cuts, x) == b for x in base) + 0.5) / (len(base) + 0.5 * (len(cuts) + 1))
        total += (p - q) * math.log(p / q)
    return total


def ks_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    return max(abs((a <= x).mean() - (b <= x).mean()) for x in np.concatenate([a, b]))


def whole(corpus: Path, model: Path, sink: Path, capsys) -> dict:
    """As from a command line, with a score that needs the model."""
    run_job("audit", audit_options(corpus, model, sink))
    return last_line(capsys)


def test_drift_on_the_third_day_is_found_on_the_third_day(model, tmp_path, capsys):
    corpus, sink = tmp_path / "arrivals", tmp_path / "out"
    day(corpus, "2026-11-01", range(120))
    first = whole(corpus, model, sink, capsys)
    assert (first["status"], first["rows"], first["baseline"]) == ("baseline", 120, "(itself)")

    day(corpus, "2026-11-02", range(120, 250))
    second = whole(corpus, model, sink, capsys)
    assert (second["status"], second["rows"], second["baseline"]) == ("fine", 130, "000001")
    assert second["findings"] == []

    day(corpus, "2026-11-03", range(250, 380), drifted=True)
    with pytest.raises(
        DriftFound, match=r"psi of vector_filter\.test\.L2 is .* \(> 0\.25; 130 rows against 120\)"
    ) as e:
        whole(corpus, model, sink, capsys)
    assert e.value.status == 3
    third = last_line(capsys)
    assert (third["status"], third["exit_status"], third["rows"]) == ("fail", 3, 130)

    # Each audit scored what was new, and that alone.
    assert [len(scored(sink, f"00000{k}")) for k in (1, 2, 3)] == [120, 130, 130]
    assert set(scored(sink, "000003")) == {f"r{i}" for i in range(250, 380)}

    rows = {(r["audit"], r["column"]): r for r in history(sink)}
    base = column(sink, "000001", COLUMN)
    for name in ("000002", "000003"):
        new, found = column(sink, name, COLUMN), rows[name, COLUMN]
        assert found["psi"] == pytest.approx(psi_by_hand(new, base), rel=1e-9)
        assert found["ks"] == pytest.approx(ks_by_hand(new, base), abs=1e-12)
        assert (found["n"], found["baseline_n"]) == (130, 120)
        assert found["q50"] == pytest.approx(float(np.median(new)))
        assert found["threshold"] == pytest.approx(float(np.quantile(base, 0.95)))
        assert found["share_above"] == pytest.approx(float((new > found["threshold"]).mean()))
    assert rows["000003", COLUMN]["ks_p"] < 1e-6 < 0.01 < rows["000002", COLUMN]["ks_p"]
    assert rows["000001", COLUMN]["psi"] is None

    # The worst rows are those of the highest scores, with their texts.
    worst = summary(sink, "000003")["worst"]
    ranked = sorted(scored(sink, "000003").items(), key=lambda kv: -kv[1][COLUMN])
    assert [w["id"] for w in worst] == [name for name, _ in ranked[:10]]
    assert all(w["response"].startswith("absolutely") for w in worst)
    page = (sink / "audits" / "index.html").read_text()
    assert "severity <strong>fail</strong>" in page

    # Nothing new: nothing is done, and that is well.
    again = whole(corpus, model, sink, capsys)
    assert (again["status"], again["exit_status"], again["rows"]) == ("nothing new", 0, 0)
    assert not (sink / "audits" / "000004").exists()
    assert json.loads((sink / "audits" / "000003" / "committed.json").read_text())["fired"]


def test_new_is_content_not_a_name_or_a_date(place, capsys):
    corpus, _, sink = place
    first = day(corpus, "2026-11-01", range(30))
    audit(*place, capsys)
    first.rename(corpus / "moved.jsonl")  # renamed
    shutil.copy(corpus / "moved.jsonl", corpus / "copy.jsonl")  # copied
    found = audit(*place, capsys)
    assert (found["status"], found["rows"]) == ("nothing new", 0)
    before = pq.read_table(sink / "audits" / "known.parquet").num_rows
    storage.local_path(str(corpus / "copy.jsonl")).touch()  # touched
    assert audit(*place, capsys)["status"] == "nothing new"
    assert pq.read_table(sink / "audits" / "known.parquet").num_rows == before
    day(corpus, "2026-11-02", range(30, 45))
    day(corpus, "2026-11-02-again", range(30, 45))  # twice in one audit
    found = audit(*place, capsys)
    assert (found["rows"], found["same"]) == (15, 1)
    assert ids(sink, "000002") == names(*range(30, 45))


def test_of_a_file_that_grew_only_the_appended_rows_are_new(place, capsys):
    corpus, _, sink = place
    day(corpus, "log", range(25))
    audit(*place, capsys)
    day(corpus, "log", range(42))
    found = audit(*place, capsys)
    assert (found["rows"], found["grown"]) == (17, 1)
    assert ids(sink, "000002") == names(*range(25, 42))
    tables = [pq.read_table(p) for p in (sink / "audits/000002/scores/parts").rglob("*.parquet")]
    assert {r for t in tables for r in t["row"].to_pylist()} == set(range(25, 42))  # their places in the file
    text = (corpus / "chats-log.jsonl").read_text().replace("question 3?", "question three?")
    (corpus / "chats-log.jsonl").write_text(text)
    found = audit(*place, capsys)
    assert (found["rows"], found["grown"]) == (42, 0)  # rewritten: nobody can say which rows are old
    # Without the copy of what is known, the manifests of the audits say the same.
    (sink / "audits" / "known.parquet").unlink()
    assert audit(*place, capsys)["status"] == "nothing new"


def test_a_broken_file_waits_and_bad_rows_are_a_rule(place, capsys):
    corpus, _, sink = place
    day(corpus, "2026-11-01", range(20))
    audit(*place, capsys)
    whole = day(corpus, "2026-11-02", range(20, 40)).read_text()
    (corpus / "chats-2026-11-02.jsonl").write_text(whole[:-30])  # still being written
    rows = [arrival(i) for i in range(40, 50)] + [{"id": f"bad{i}", "messages": []} for i in range(3)]
    write_jsonl(corpus / "chats-2026-11-03.jsonl", rows)
    with pytest.raises(DriftFound, match=r"quarantined is 0\.2308 \(> 0\.05; 13 rows\)"):
        audit(*place)
    found = last_line(capsys)
    assert (found["rows"], found["scored"], found["quarantined"]) == (13, 10, 3)
    assert "chats-2026-11-02.jsonl is cut off" in found["left_out"][0]
    assert summary(sink, "000002")["reasons"] == {"no assistant turn": 3}
    (corpus / "chats-2026-11-02.jsonl").write_text(whole)
    assert audit(*place, capsys)["rows"] == 20
    assert ids(sink, "000003") == names(*range(20, 40))


def test_a_file_of_another_schema_is_bad_rows_not_an_error(place, capsys):
    corpus, _, _ = place
    day(corpus, "2026-11-01", range(20))
    audit(*place, capsys)
    write_jsonl(corpus / "other.jsonl", [{"text": "hello", "n": i} for i in range(8)])
    with pytest.raises(DriftFound, match="quarantined is 1 "):
        audit(*place)
    found = last_line(capsys)
    assert (found["rows"], found["scored"]) == (8, 0)


def test_sources_labels_and_languages(place, capsys):
    corpus, _, sink = place
    more = {"audit.by": "folder", "audit.languages": 500, "audit.new_share": 0.05}
    for k, name in enumerate(("forum", "desk")):
        day(corpus / "2026-11-01" / name, "a", range(k * 30, k * 30 + 30))
    audit(*place, capsys, **more)
    rows = [arrival(i) for i in range(60, 100)]
    german = "Ich habe mir deinen Plan angesehen und finde, dass du vorher mit dem Vermieter sprechen solltest."
    for i, row in enumerate(rows):
        row["label"] = "unheard of" if i == 7 else row["label"]
        if i < 12:
            row["messages"][1]["content"] = f"{german} {i}."
    write_jsonl(corpus / "2026-11-02" / "forum" / "b.jsonl", rows)
    found = audit(*place, capsys, **more)
    assert found["status"] == "warn"
    assert (found["new_labels"], found["new_languages"]) == (["unheard of"], ["de"])
    assert summary(sink, "000002")["languages"]["de"] == 12
    # A folder named after a day is no source of its own.
    assert {r["source"] for r in history(sink)} == {"", "*/forum", "*/desk"}
    by = {(r["audit"], r["source"]): r["rows"] for r in history(sink)}
    assert by["000001", "*/forum"] == by["000001", "*/desk"] == 30
    assert by["000001", ""] == 60
    # What was heard once is not new again.
    write_jsonl(corpus / "2026-11-03" / "forum" / "c.jsonl", [{**r, "id": r["id"] + "x", "n": 0} for r in rows])
    assert audit(*place, capsys, **more)["new_labels"] == []


def test_groups_are_sources_too(place, capsys):
    corpus, _, sink = place
    day(corpus, "2026-11-01", range(30))
    audit(*place, capsys, **{"audit.by": "group"})
    expected = {g: sum(arrival(i)["group"] == g for i in range(30)) for g in ("g0", "g1", "g2")}
    assert {r["source"]: r["rows"] for r in history(sink) if r["source"]} == expected


def test_a_backfill_is_one_audit_a_day(place, capsys):
    corpus, _, sink = place
    for d in range(1, 6):
        day(corpus, f"2026-11-0{d}", range(20 * d, 20 * d + 20))
    day(corpus / "2026/11/03", "more", range(500, 505))  # a day in folders
    found = audit(*place, capsys, **{"audit.backfill": ["2026-11-02", "2026-11-04"]})
    made = {a["label"]: a["rows"] for a in found["audits"]}
    assert made == {"2026-11-02": 20, "2026-11-03": 25, "2026-11-04": 20}
    assert ids(sink, "000002") == names(*range(60, 80), *range(500, 505))
    again = audit(*place, capsys, **{"audit.backfill": ["2026-11-02", "2026-11-04"]})
    assert again["status"] == "nothing new"
    # An ordinary audit takes the rest, days on both sides.
    assert audit(*place, capsys)["rows"] == 40
    late = day(corpus, "2026-11-01b", range(900, 910))
    found = audit(*place, capsys, **{"audit.backfill": ["2026-11-01", "2026-11-01"]})
    assert found["label"] == "2026-11-01"
    assert late.exists()
    order = list(dict.fromkeys(r["label"] for r in history(sink)))
    assert order[:4] == ["2026-11-01", "2026-11-02", "2026-11-03", "2026-11-04"]  # by time, not by when it was run


def test_a_day_is_when_a_file_was_changed_where_its_name_has_none(place, capsys):
    corpus, _, _ = place
    path = day(corpus, "x", range(10))
    noon = 1_793_534_400  # 2026-11-01 12:00 UTC
    os.utime(path, (noon, noon))
    assert audit(*place, capsys, **{"audit.backfill": ["2026-11-02", "2026-11-30"]})["status"] == "nothing new"
    assert audit(*place, capsys, **{"audit.backfill": ["2026-11-01", "2026-11-01"]})["rows"] == 10


def test_score_parts_of_old_audits_go_and_what_they_found_stays(place, capsys):
    corpus, _, sink = place
    for d in range(1, 5):
        day(corpus, f"2026-11-0{d}", range(10 * d, 10 * d + 10))
        audit(*place, capsys, **{"audit.keep": 2})
    there = [bool(list((sink / f"audits/00000{k}/scores").rglob("*.parquet"))) for k in range(1, 5)]
    assert there == [True, False, True, True]  # the first is the baseline
    assert len({r["audit"] for r in history(sink)}) == 4
    assert summary(sink, "000002")["rows"] == 10
    day(corpus, "2026-11-06", range(60, 70))
    with pytest.raises(ConfigError, match=r"the baseline '000002' has no score parts.*retention"):
        audit(*place, **{"audit.baseline": "000002"})
    assert audit(*place, capsys, **{"audit.baseline": "previous"})["baseline"] == "000004"


def test_two_audits_do_not_overlap(place, capsys):
    corpus, _, sink = place
    day(corpus, "2026-11-01", range(10))
    url = str(sink / "audits" / "lease.json")
    with Lease(url, 300):
        with pytest.raises(LeaseError, match="another audit is at work"):
            audit(*place)
        assert audit(*place, capsys, **{"audit.locked": "skip"})["status"] == "skipped"
        assert not (sink / "audits" / "000001").exists()
    # One that died is taken over.
    dead = Lease(url, 1)
    assert dead._try() is None
    storage.write_atomic(url, json.dumps({**json.loads(Path(url).read_text()), "renewed": time.time() - 100}))
    assert audit(*place, capsys)["rows"] == 10
    assert not Path(url).exists()


def test_an_audit_that_lost_its_lease_commits_nothing(place, monkeypatch):
    corpus, _, sink = place
    day(corpus, "2026-11-01", range(10))
    monkeypatch.setattr(Lease, "check", lambda self: (_ for _ in ()).throw(LeaseError("taken over")))
    with pytest.raises(LeaseError, match="taken over"):
        audit(*place)
    assert not list((sink / "audits").rglob("committed.json"))
    assert not (sink / "audits" / "history.parquet").exists()


def test_an_unfinished_audit_goes_on_with_its_parts(place, capsys, monkeypatch):
    """As a killed one leaves it: a plan, some parts, no marker. Meanwhile one file grew, one changed, one came."""
    corpus, _, sink = place
    for name, rows in (("kept", range(30)), ("log", range(100, 125)), ("changed", range(200, 220))):
        day(corpus, name, rows)
    monkeypatch.setattr(Lease, "check", lambda self: (_ for _ in ()).throw(LeaseError("killed")))
    with pytest.raises(LeaseError):
        audit(*place)
    monkeypatch.undo()
    monkeypatch.setattr("tests.jobs.helpers.HERE", True)
    parts = sink / "audits/000001/scores/parts"
    (parts / "chats-kept.jsonl" / "000000000010-000000000020.parquet").unlink()
    before = {p: p.stat().st_mtime_ns for p in parts.rglob("*.parquet") if "changed" not in str(p)}
    day(corpus, "log", range(100, 142))
    day(corpus, "changed", range(300, 320))
    day(corpus, "came", range(400, 410))
    found = audit(*place, capsys)
    assert (found["audit"], found["rows"]) == ("000001", 30 + 42 + 20 + 10)
    assert {p: p.stat().st_mtime_ns for p in before} == before  # what was done was not done again
    assert ids(sink, "000001") == names(*range(30), *range(100, 142), *range(300, 320), *range(400, 410))


def test_what_a_kill_after_the_marker_leaves_is_made_up_for(place, capsys):
    corpus, _, sink = place
    for d in (1, 2):
        day(corpus, f"2026-11-0{d}", range(10 * d, 10 * d + 10))
        audit(*place, capsys)
    whole = history(sink)
    for name in ("history.parquet", "known.parquet", "index.html"):
        (sink / "audits" / name).unlink()
    assert audit(*place, capsys)["status"] == "nothing new"
    assert history(sink) == whole
    assert (sink / "audits" / "index.html").exists()


def test_scores_of_a_run_are_a_baseline(place, capsys, tmp_path):
    corpus, model, _ = place
    reference = write_jsonl(tmp_path / "reference" / "a.jsonl", [arrival(i) for i in range(1000, 1120)])
    own = {"scorer": "[response_length]", "concept": "[]", "concept.file.path": None, "source.max_tokens": 512}
    run_job("score", options(reference.parent, model, tmp_path / "run", **own))
    day(corpus, "2026-11-01", range(130), drifted=True)
    with pytest.raises(DriftFound):
        audit(*place, **{"audit.baseline": f"{tmp_path}/run"})
    found = last_line(capsys)
    assert (found["baseline"], found["baseline_rows"]) == (str(tmp_path / "run"), 120)
    day(corpus, "2026-11-02", range(200, 210))
    run_job("score", options(reference.parent, model, tmp_path / "other", **{**own, "source.max_tokens": 256}))
    with pytest.raises(RecipeError, match="max_tokens"):
        audit(*place, **{"audit.baseline": f"{tmp_path}/other"})
    with pytest.raises(ConfigError, match="holds no scores"):
        audit(*place, **{"audit.baseline": f"{tmp_path}/nowhere"})
    with pytest.raises(ConfigError, match="no audit has that name"):
        audit(*place, **{"audit.baseline": "2025"})


def test_audits_of_one_place_share_a_recipe(place, capsys):
    corpus, _, sink = place
    day(corpus, "2026-11-01", range(10))
    audit(*place, capsys)
    day(corpus, "2026-11-02", range(10, 20))
    with pytest.raises(RecipeError, match=r"max_tokens: there 512, now 300"):
        audit(*place, **{"source.max_tokens": 300})
    assert not list((sink / "audits").glob("000002/scores/parts/*"))
    assert audit(*place, capsys)["rows"] == 10


def test_a_second_attempt_does_not_turn_a_failure_into_a_success(place, capsys):
    day(place[0], "2026-11-01", range(10))
    rules = {"audit.rules": [{"measure": "rows", "limit": 5}], "audit.nothing_new": "repeat"}
    for said in ("rows is 10", "audit 000001: rows is 10"):
        with pytest.raises(DriftFound, match=said):
            audit(*place, **rules)
    assert audit(*place, capsys, **{**rules, "audit.nothing_new": "fine"})["status"] == "nothing new"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"audit.webhook.url": "https://hooks.example.com/x"}, "may not send to hooks.example.com"),
        ({"audit.webhook.url": "https://h/x", "audit.webhook.allowed_hosts": ["h"]}, "CURATE_WEBHOOK_SECRET, which"),
        ({"audit.webhook.url_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE, which is not set"),
        ({"source.max_rows": 5}, "source.max_rows=5 would leave rows out"),
        ({"audit.column": "vector"}, "audit.column is 'vector', which was not scored"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_met_are_named(place, more, said):
    day(place[0], "2026-11-01", range(4))
    with pytest.raises(CurateError, match=said.replace(".", r"\.")):
        audit(*place, **more)
