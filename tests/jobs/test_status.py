"""Status of real jobs' sinks. For places laid out by hand see runtime/test_status; for kills jobs/test_s3."""

from __future__ import annotations

import json
import time

import pytest

from curate.errors import CorpusError
from curate.runtime.status import Status, read_status
from jobs.app import compose_config
from jobs.work import work_name
from tests.conftest import conversation, write_jsonl
from tests.jobs.auditing import audit, day
from tests.jobs.helpers import complete, options, run_job

pytestmark = pytest.mark.usefixtures("here")


def seen(sink) -> Status:
    return read_status(str(sink), time.time())


def test_a_run_and_what_is_missing_afterwards(corpus, model, tmp_path):
    from conf.schema import settings

    sink = tmp_path / "out"
    run_job("run", options(corpus, model, sink))
    assert complete(sink) == {"score": (100, 100), "select": (100, 100)}
    (run,) = seen(sink).runs
    assert run.run == work_name("run", settings(compose_config("run", options(corpus, model, sink))))
    assert {"report.html", "summary.json", "curated"} <= seen(sink).products.keys()
    # The same without the job's note, by the layout alone.
    (sink / "_status" / "run.json").unlink()
    assert complete(sink) == {"score": (100, 100), "select": (100, 100)}
    next(sink.rglob("scores/parts/**/*.parquet")).unlink()
    ((score, _),) = (r.stages for r in seen(sink).runs)
    assert (score.done, score.total, seen(sink).state) == (90, 100, "running")


def test_the_first_rows_are_all_that_was_asked_for(corpus, model, tmp_path):
    run_job("run", options(corpus, model, tmp_path / "out", **{"source.max_rows": 25}))
    assert complete(tmp_path / "out") == {"score": (25, 25), "select": (25, 25)}
    (tmp_path / "out" / "_status" / "run.json").unlink()
    assert complete(tmp_path / "out") == {"score": (25, 25), "select": (25, 25)}  # the ledger says how many


def test_a_run_that_failed_says_why(model, tmp_path):
    rows = [*(conversation(i) for i in range(20)), *({"id": f"bad{i}", "messages": []} for i in range(20))]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    with pytest.raises(CorpusError, match="are bad"):
        run_job("score", options(tmp_path / "corpus", model, tmp_path / "out"))
    found = seen(tmp_path / "out")
    assert (found.state, found.runs[0].state) == ("failed", "failed")
    assert "are bad, more than source.max_bad_fraction=0.1" in found.runs[0].message
    (score,) = found.runs[0].stages
    assert score.quarantined > 4
    assert score.reasons == (("no assistant turn", score.quarantined),)
    run_job("score", options(tmp_path / "corpus", model, tmp_path / "out", **{"source.max_bad_fraction": 0.6}))
    assert complete(tmp_path / "out") == {"score": (40, 40)}


def test_audits(model, tmp_path):
    corpus, sink = tmp_path / "arrivals", tmp_path / "out"
    for n in (1, 2):
        day(corpus, f"2026-11-0{n}", range(20 * n, 20 * n + 20))
        audit(corpus, model, sink)
        assert complete(sink) == {"score": (20, 20), "audits": (n, n)}
    marker = sink / "audits" / "000002" / "committed.json"
    kept = json.loads(marker.read_text())
    marker.unlink()
    assert kept["number"] == 2
    found = seen(sink)
    assert found.state == "incomplete"
    assert {s.stage: (s.done, s.total) for s in found.runs[0].stages}["audits"] == (1, 2)
