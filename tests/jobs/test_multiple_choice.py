"""Multiple-choice questions through the jobs: scored and curated as any corpus, bad rows told apart."""

from __future__ import annotations

import json

import pytest

from tests.conftest import write_jsonl
from tests.jobs.helpers import curated, ledger, options, run_job, scores

ROWS = [
    {"id": f"q{i}", "question": f"Is {i} even?", "choices": ["yes", "no", "maybe"], "answer": i % 2, "why": [i]}
    for i in range(12)
]
BAD = {3: {"answer": 3}, 5: {"choices": []}, 7: {"answer": None}}


@pytest.mark.usefixtures("here")
def test_questions_are_curated_and_bad_ones_quarantined(model, tmp_path):
    rows = [{**r, **BAD.get(i, {})} for i, r in enumerate(ROWS)]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    given = options(
        tmp_path / "corpus",
        model,
        tmp_path / "out",
        **{
            "source": "mcq",
            "source.max_bad_fraction": 0.5,
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
            "selector.fraction": 0.4,
            "sink.store": tmp_path / "store",
        },
    )
    run_job("score", given)
    run_job("select", given)
    assert len(scores(tmp_path / "out", "response_length")) == len(ROWS) - len(BAD)
    told = {r["row"]: r["reason"] for r in ledger(tmp_path / "out") if r["decision"] == "quarantined"}
    assert set(told) == set(BAD)
    assert "'answer' is 3" in told[3]
    assert "0 options" in told[5]
    assert "no right answer" in told[7]
    (kept,) = curated(tmp_path / "out").values()
    assert kept
    assert all(row == rows[int(row["id"][1:])] for row in kept)  # the source's own columns, as they were
    lengths = scores(tmp_path / "out", "response_length")
    run_job("score", [*given, "source.columns.answer_form=letter", f"sink.url={tmp_path / 'letters'}"])
    assert all(n < lengths[k] for k, n in scores(tmp_path / "letters", "response_length").items())
    recipe = json.loads((tmp_path / "out" / "scores" / "recipe.json").read_text())
    assert recipe["fields"]["corpus"]["columns"]["answer_form"] == "letter_and_text"
