"""The chaos harness in short: one kill of each kind over scores on two nodes. `make chaos` is the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.chaos.schedule import Trial
from tests.faults.chaos.table import markdown
from tests.faults.chaos.trial import Outcome, redone
from tests.jobs.helpers import ROOT

PAUSE = 0.04


def test_a_seed_is_a_schedule():
    one, other = Trial(0, "score", "actor", 0), Trial(1, "score", "actor", 0)
    moments = one.moments(60, 5, PAUSE)
    assert moments == one.moments(60, 5, PAUSE) != other.moments(60, 5, PAUSE)
    commits = [m.commits for m in moments]
    assert commits == sorted(set(commits))
    assert 0 < commits[0] <= commits[-1] < 59
    with pytest.raises(ValueError, match="leave no room"):
        one.moments(6, 5, PAUSE)


def test_what_was_begun_again_counts_as_redone(tmp_path):
    log = tmp_path / "begun"
    log.write_text("/a/t/out\t1\tx:0-5\n/a/t/out\t2\tx:0-5\n/a/t/out\t2\tx:5-10\n/a/other/out\t1\tx:0-5\n")
    assert redone(log, Path("/a/t")) == 1


def test_the_table_adds_trials_up():
    a = Outcome("t0", "score", "actor", kills=5, redone=4, allowed=5, gone=1.5, seconds=50).__dict__
    b = Outcome("t1", "score", "actor", kills=3, lost=1, redone=1, allowed=3, gone=0.5, seconds=30).__dict__
    (row,) = markdown([a, b]).splitlines()[2:]
    assert row == "| score | actor | 8 | 1 | 0 | 0 | 5 (8) | 0 | 0 | 0 | 1.5 | 2 | 10.0 |"
    assert Outcome(**a).good
    assert not Outcome(**b).good


@pytest.mark.slow
@pytest.mark.timeout(1500)  # on a busy machine; a trial gives itself up when nothing has come for five minutes
def test_kills_of_each_kind_cost_at_most_a_unit_a_worker(tmp_path):
    """In a process of its own: the nodes it starts and their environment are nothing for the tests that follow."""
    asked = ["--jobs", "score", "--kinds", "mixed", "--kills", "5", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tests.faults.chaos", *asked]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    # More than one where a job ended before its last kill.
    outcomes = [Outcome(**json.loads(line)) for line in (tmp_path / "seed-0.jsonl").read_text().splitlines()]
    assert all(o.good for o in outcomes)
    assert {name for o in outcomes for name in o.hits} >= {"actor", "driver", "node"}
