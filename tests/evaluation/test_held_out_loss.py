"""Held-out loss: which rows are asked, and what their likelihoods become."""

from __future__ import annotations

import json

import pytest

from curate.errors import ConfigError, CorpusError
from curate.evaluation.base import Likelihood, summarise
from curate.evaluation.held_out_loss import HeldOutLoss
from tests.conftest import conversation, write_jsonl


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [conversation(i) for i in range(6)])


def test_rows_become_candidates(rows):
    asked = HeldOutLoss(str(rows)).candidates()
    assert [c.response for c in asked] == [conversation(i)["messages"][1]["content"] for i in range(6)]
    assert [c.messages[0].content for c in asked] == [f"question {i}?" for i in range(6)]
    some = HeldOutLoss(str(rows), first=2, max_rows=3).candidates()
    assert [c.response for c in some] == [c.response for c in asked[2:5]]


def test_loss_is_nats_a_token(rows):
    evaluator = HeldOutLoss(str(rows), columns={"group": "group"})
    found = {str(i): Likelihood(-3.0 * (i + 1), 4) for i in range(5)}  # the sixth was too long
    items = evaluator.items({}, found, None)
    assert [i.values["loss"] for i in items] == [0.75, 1.5, 2.25, 3.0, 3.75, None]
    assert [i.group for i in items] == ["g0", "g1", "g2"] * 2
    assert len({i.id for i in items}) == 6
    measure = summarise(items, evaluator.metrics)["loss"]
    assert (measure.value, measure.n, measure.missing) == (2.25, 5, 1)


def test_named_columns(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"q": "why?", "a": "so"}) + "\n")
    asked = HeldOutLoss(str(path), columns={"prompt": "q", "response": "a", "system": None}).candidates()
    assert [(c.messages[0].content, c.response) for c in asked] == [("why?", "so")]


def test_fingerprint_follows_the_text_and_not_the_place(rows, tmp_path):
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(rows.read_bytes())
    assert HeldOutLoss(str(copy)).fingerprint() == HeldOutLoss(str(rows)).fingerprint()
    assert HeldOutLoss(str(rows), max_rows=5).fingerprint() != HeldOutLoss(str(rows)).fingerprint()
    # Groups decide the interval.
    assert HeldOutLoss(str(rows), columns={"group": "group"}).fingerprint() != HeldOutLoss(str(rows)).fingerprint()


def test_bad_input(rows, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no row \[6, end\)"):
        HeldOutLoss(str(rows), first=6)
    with pytest.raises(ConfigError, match="max_rows=0"):
        HeldOutLoss(str(rows), max_rows=0)
    with pytest.raises(ConfigError, match="has no 'promt'; did you mean 'prompt'"):
        HeldOutLoss(str(rows), columns={"promt": "q"})
    broken = tmp_path / "broken.jsonl"
    broken.write_text(rows.read_text() + '{"messages": 3}\n')
    with pytest.raises(ConfigError, match=r"row 6 of .*broken.jsonl cannot be used: 'messages' is int"):
        HeldOutLoss(str(broken))
    other = tmp_path / "other.jsonl"
    other.write_text('{"x": 1}\n')
    with pytest.raises(CorpusError, match="fit no known layout"):
        HeldOutLoss(str(other))
