"""Events: what a line says of where it comes from, in this process and in one that works for it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

from curate.runtime import events, metrics
from curate.runtime.inline import inline
from curate.runtime.progress import Progress
from curate.runtime.session import Pool
from curate.runtime.stream import stream


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setenv("CURATE_LOG", "json")
    monkeypatch.setattr(events, "_stage", None)  # a stage that another test ended by an error


def lines(capsys) -> list[dict]:
    return [json.loads(x) for x in capsys.readouterr().err.splitlines()]


def test_a_line_says_where_it_comes_from(as_json, capsys):
    with events.run_of("curate-score-1", "score"):
        progress = Progress("score", 10)
        with events.about("a.jsonl:0-10"):
            events.say("WARNING: odd", rows=3)
            events.say("inner", unit="b:1-2")
        progress.close()
        events.say("after")
    events.say("elsewhere")
    found = lines(capsys)
    common = {"run": "curate-score-1", "job": "score", "stage": "score"}
    keep = [{k: v for k, v in x.items() if k != "time"} for x in found]
    assert keep[0] == {"level": "warning", "event": "odd", **common, "unit": "a.jsonl:0-10", "rows": 3}
    assert keep[1]["unit"] == "b:1-2"
    assert keep[2].items() >= {"event": "score: done", "rows": 0, **common}.items()
    assert keep[3] == {"level": "info", "event": "after", "run": "curate-score-1", "job": "score"}
    assert keep[4] == {"level": "info", "event": "elsewhere"}
    assert all(x["time"].endswith("Z") for x in found)
    assert "CURATE_RUN" not in os.environ


def test_text_is_for_a_person(capsys):
    with events.run_of("curate-score-1", "score"):
        events.say("WARNING: odd", rows=3)
        events.note("too fine")
    assert capsys.readouterr().err == "WARNING: odd rows=3\n"


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_the_librarys_log_is_said(as_json, capsys, level):
    logger = logging.getLogger("curate")
    before = logger.handlers[:], logger.level, sys.excepthook
    logger.handlers = []
    try:
        events.listen()
        getattr(logging.getLogger("curate.models.load"), level)("converted %s", "once")
    finally:
        logger.handlers, level_before, sys.excepthook = before
        logger.setLevel(level_before)
    (found,) = lines(capsys)
    assert (found["level"], found["event"]) == (level, "converted once")


def test_another_process_takes_the_scene_over():
    """As a worker does: with what it was given, whatever was in its environment."""
    code = (
        "import logging, os, sys\n"
        "from curate.runtime import events\n"
        "events.enter(events.Scene('r1', 'score', 'fit: covariance', True))\n"
        "logging.getLogger('curate.x').warning('hot')\n"
        "print(os.environ['CURATE_RUN'], os.environ['CURATE_LOG'])\n"
        "events.enter(events.Scene('r2', 'score', None, False))\n"
        "events.say('plain')\n"
        "print(os.environ['CURATE_RUN'], 'CURATE_LOG' in os.environ)\n"
        "events.enter(events.Scene(json=True))\n"
        "raise ValueError('the end')\n"
    )
    env = {**os.environ, "CURATE_RUN": "old", "CURATE_JOB": "old"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "r1 json\nr2 False\n"
    hot, plain, last = done.stderr.splitlines()
    assert json.loads(hot).items() >= {"run": "r1", "job": "score", "stage": "fit: covariance", "event": "hot"}.items()
    assert plain == "plain"
    assert json.loads(last).items() >= {"level": "critical", "event": "ValueError: the end"}.items()
    assert "Traceback" in json.loads(last)["traceback"]
    assert "run" not in json.loads(last)


def make():
    def work(item: bytes) -> bytes:
        events.say("working", item=item.decode())
        logging.getLogger("curate.deep").info("deeper")
        return json.dumps({"run": os.environ.get("CURATE_RUN"), **vars(events.scene())}).encode()

    return work


@pytest.mark.usefixtures("running")
def test_workers_on_ray_know_their_scene(as_json):
    pool = Pool(1, 0.5, 0)
    with events.run_of("curate-score-2", "score"):
        before = events.set_stage("generate")
        (first,) = map(json.loads, stream([b"1"], make, pool))
        events.set_stage(before)
        (second,) = map(json.loads, stream([b"1"], make, pool))
    assert first == {"run": "curate-score-2", "job": "score", "stage": "generate", "json": True}
    assert second["stage"] is None


def test_inline_work_is_in_the_same_scene(as_json, capsys):
    with inline(), events.run_of("curate-score-3", "score"):
        (found,) = map(json.loads, stream([b"1"], make, Pool(1, 1, 0)))
    assert found["run"] == "curate-score-3"
    assert lines(capsys)[0].items() >= {"event": "working", "run": "curate-score-3"}.items()


def test_progress_tells_the_share_of_the_peak(capsys):
    progress = Progress("score", 20, items=2)
    progress.add(10, 5, 0, flops=3e9, busy=2.0, peak=1e10)
    progress.add(10, 5, 0, flops=1e9, busy=2.0, peak=1e10)
    progress.close()
    assert "peak=10.0%" in capsys.readouterr().err  # 4e9 of 4 s x 1e10
    assert progress.items == 0


def test_names_of_metrics_are_prometheus_own():
    names = [*metrics.COUNTERS, *metrics.GAUGES, metrics.ERRORS]
    assert len(set(names)) == len(names)
    assert all(n.startswith("curate_") and n.islower() for n in names)
