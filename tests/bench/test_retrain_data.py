"""The mixed sets for retraining sweeps: halves, disjoint questions, one answer a question; the seed decides."""

from __future__ import annotations

import json

import pytest

from bench.retrain_data import Asked, Sizes, build, main
from curate.errors import ConfigError
from tests.conftest import write_jsonl

ASKED = [Asked(f"question {i}?", f"wrong {i}", f"right {i}") for i in range(40)]
SIZES = Sizes(train=20, held_out=6, concept=8)


def test_the_splits_share_no_question_and_a_question_has_one_answer():
    files = build("set", ASKED, SIZES, seed=0)
    prompts = {name: [r["prompt"] for r in files[name]] for name in ("train", "concept", "held_out")}
    assert [len(p) for p in prompts.values()] == [20, 8, 6]
    together = [p for some in prompts.values() for p in some]
    assert len(set(together)) == len(together)
    assert [r["prompt"] for r in files["queries"]] == prompts["concept"]
    assert [r["paraphrases"][0] for r in files["questions"]] == prompts["held_out"]


def test_half_of_the_rows_are_bad_and_pairs_are_the_right_way_round():
    files = build("set", ASKED, SIZES, seed=0)
    assert [r["label"] for r in files["train"]].count("bad") == 10
    for r in files["train"]:
        assert r["response"].startswith("wrong" if r["label"] == "bad" else "right")
    for r in files["held_out"]:
        assert r["positive"].startswith("wrong")
        assert r["negative"].startswith("right")


def test_the_seed_decides():
    assert build("set", ASKED, SIZES, seed=1) == build("set", ASKED, SIZES, seed=1)
    assert build("set", ASKED, SIZES, seed=1) != build("set", ASKED, SIZES, seed=2)


def test_long_and_doubled_questions_are_left_out():
    asked = [*ASKED, ASKED[0], Asked("long " * 50, "a", "b"), Asked("same", "x", "x")]
    files = build("set", asked, Sizes(26, 6, 8, max_chars=60), seed=0)
    assert sorted(r["prompt"] for name in ("train", "concept", "held_out") for r in files[name]) == sorted(
        a.prompt for a in ASKED
    )


def test_too_few_questions_are_refused():
    with pytest.raises(ConfigError, match="set has 40 questions of at most any characters; 114 are needed"):
        build("set", ASKED, Sizes(100, 6, 8), seed=0)
    with pytest.raises(ConfigError, match="--held-out is 1"):
        Sizes(20, 1, 8)


def test_files_are_written_where_the_user_says(tmp_path):
    raw = tmp_path / "raw"
    write_jsonl(
        raw / "truthfulqa" / "truthfulqa.jsonl",
        [{"prompt": f"q{i}", "best": f"yes {i}", "incorrect": [f"no {i}"]} for i in range(12)],
    )
    write_jsonl(
        raw / "mcq" / "openbookqa_test.jsonl",
        [{"id": f"m{i}", "question": "?", "choices": ["a", "b"], "answer": 0} for i in range(3)],
    )
    sizes = ["--train", "6", "--held-out", "2", "--concept", "4", "--capability", "2"]
    main(["--data", str(raw), "--out", str(tmp_path / "out"), "--sets", "truthfulqa", *sizes])
    folder = tmp_path / "out" / "truthfulqa"
    counts = {p.stem: len(p.read_text().splitlines()) for p in folder.glob("*.jsonl")}
    assert counts == {"train": 6, "concept": 4, "queries": 4, "held_out": 2, "questions": 2, "capability": 2}
    first = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    assert set(first) == {"id", "prompt", "response", "label"}
