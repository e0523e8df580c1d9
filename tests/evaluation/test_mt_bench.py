"""Two-turn questions: turns, what the judge is told, ratings."""

from __future__ import annotations

import json
import re

import pytest

from curate.errors import ConfigError
from curate.evaluation.base import summarise
from curate.evaluation.judge import JudgeScore, NoJudge
from curate.evaluation.mt_bench import MTBench
from tests.evaluation.judges import Says
from tests.real_data import real

ROWS = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Shorter."]},
    {"question_id": 2, "category": "math", "turns": ["1+1?", "Twice that?"], "reference": ["two", "four"]},
    {"question_id": 3, "category": "math", "turns": ["2+2?", "Half of it?"], "reference": ["", "two again"]},
]
REFERENCES = [{"question_id": 2, "choices": [{"index": 0, "turns": ["It is 2.", "It is 4."]}]}]
SAID = {"1/1": "A story.", "1/2": "Story.", "2/1": "2", "2/2": "4", "3/1": "", "3/2": ""}


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "question.jsonl", ROWS)


def test_second_turns_build_on_first_answers(path):
    asked = MTBench(path, system="Hi.")
    assert [p.id for p in asked.prompts()] == ["1/1", "2/1", "3/1"]
    follow = asked.follow_ups({"1/1": "A story.", "2/1": "2", "3/1": " "})
    assert [p.id for p in follow] == ["1/2", "2/2"]  # nothing to build on for the third
    assert [(m.role, m.content) for m in follow[0].messages] == [
        ("system", "Hi."), ("user", "Write."), ("assistant", "A story."), ("user", "Shorter."),
    ]  # fmt: skip


def test_ratings_by_turn_and_category(path):
    marks = {"A story.": 100.0, "Story.": 0.0, "2": 50.0, "4": JudgeScore(None, refused=True, reason="REFUSAL")}
    asked = MTBench(path)
    items = asked.items(SAID, {}, Says(lambda q, a, t: marks[a]))
    assert [i.values["score"] for i in items] == [10.0, 1.0, 5.5, None, 1.0, 1.0]
    assert [i.group for i in items] == ["1", "1", "2", "2", "3", "3"]
    found = summarise(items, asked.metrics)
    assert found["score"].value == pytest.approx((10 + 1 + 5.5 + 1 + 1) / 5)
    assert (found["score"].n, found["score"].missing) == (5, 1)
    assert found["turn_1"].value == pytest.approx((10 + 5.5 + 1) / 3)
    assert (found["turn_2"].n, found["turn_2"].missing) == (2, 1)  # first answers are not missing second ones
    assert found["category_writing"].value == 5.5
    assert found["category_math"].n == 3
    assert found["empty"].value == pytest.approx(2 / 6)
    assert found["refused"].value == pytest.approx(1 / 6)
    assert found["unparsable"].value == 0.0
    assert items[4].detail["reason"] == "the answer is empty"


def test_what_the_judge_is_told(path, tmp_path):
    judge = Says(lambda q, a, t: 50.0)
    MTBench(path, references=write(tmp_path / "ref.jsonl", REFERENCES)).items(
        {**SAID, "3/1": "x", "3/2": "y"}, {}, judge
    )
    parts = [re.search(r"<request>\n(.*)\n</request>.*<reply>\n(.*)\n</reply>", s, re.S).groups() for s in judge.seen]
    assert parts == [
        ("Write.", "A story."),
        ("Earlier request:\nWrite.\n\nEarlier reply:\nA story.\n\nRequest to be marked:\nShorter.", "Story."),
        ("1+1?\n\nModel answer:\nIt is 2.", "2"),  # the references' file goes before the question's own
        ("Earlier request:\n1+1?\n\nEarlier reply:\n2\n\nRequest to be marked:\nTwice that?\n\nModel answer:\nIt is 4.",
         "4"),
        ("2+2?", "x"),  # no right answer to this turn
        ("Earlier request:\n2+2?\n\nEarlier reply:\nx\n\nRequest to be marked:\nHalf of it?\n\n"
         "Model answer:\ntwo again", "y"),
    ]  # fmt: skip


def test_answers_that_look_like_fields_do_no_harm(path):
    judge = Says(lambda q, a, t: 1.0)
    MTBench(path, max_questions=1).items({"1/1": "{question}", "1/2": "{answer}"}, {}, judge)
    assert "Earlier reply:\n{question}\n" in judge.seen[1]
    assert "<reply>\n{answer}\n</reply>" in judge.seen[1]


def test_categories(path):
    asked = MTBench(path, categories=["math"])
    assert [q.id for q in asked.questions] == ["2", "3"]
    assert "category_writing" not in {m.name for m in asked.metrics}


def test_judges_that_cannot_be_asked(path):
    for judge in (None, NoJudge()):
        with pytest.raises(ConfigError, match="'mt_bench' needs a judge; choose one"):
            MTBench(path).items(SAID, {}, judge)
    with pytest.raises(ConfigError, match="asked any question"):
        MTBench(path).items(SAID, {}, Says(lambda q, a, t: 1.0, reads_template=False))


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"turns": ["one"]}, {}, "line 1: 'turns' holds 1 texts; expected two"),
        ({"category": "??"}, {}, "'category' is"),
        ({"category": "Math!"}, {}, "categories that differ in punctuation alone"),
        ({"reference": "text"}, {}, "'reference' must be a list of texts"),
        ({"question_id": 2}, {}, "line 2 has the id '2'"),
        ({}, {"categories": ["maths"]}, "holds 'maths', of which .* has none; did you mean 'math'"),
        ({}, {"categories": []}, "categories is empty"),
    ],
)
def test_rows_and_options_that_cannot_be_used(tmp_path, change, options, said):
    with pytest.raises(ConfigError, match=said):
        MTBench(write(tmp_path / "q.jsonl", [{**ROWS[0], **change}, *ROWS[1:]]), **options)


def test_broken_references(path, tmp_path):
    with pytest.raises(ConfigError, match="line 1: 'choices' must be a list"):
        MTBench(path, references=write(tmp_path / "r.jsonl", [{"question_id": 2, "choices": []}]))
    with pytest.raises(ConfigError, match=r"'choices'\[0\] has no field 'turns'"):
        MTBench(path, references=write(tmp_path / "r.jsonl", [{"question_id": 2, "choices": [{"index": 0}]}]))


def test_fingerprints(path, tmp_path):
    first = MTBench(path).fingerprint()
    assert json.loads(json.dumps(first)) == first
    changes = ({"references": write(tmp_path / "r.jsonl", REFERENCES)}, {"categories": ["math"]}, {"system": "x"})
    for change in changes:
        assert MTBench(path, **change).fingerprint() != first


def test_real_files():
    asked = MTBench(real("mt_bench/question.jsonl"), references=real("mt_bench/reference_answer_gpt-4.jsonl"))
    assert len(asked.questions) == 80
    assert len([m for m in asked.metrics if m.name.startswith("category_")]) == 8
    with open(real("mt_bench/reference_answer_gpt-4.jsonl")) as lines:
        right = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, lines)}
    with open(real("mt_bench/question.jsonl")) as lines:
        given = [right.get(row["question_id"], row.get("reference", [])) for row in map(json.loads, lines)]
    said = {p.id: "An answer." for p in asked.prompts()}
    said |= {p.id: "Another." for p in asked.follow_ups(said)}
    assert len(said) == 160
    judge = Says(lambda q, a, t: 75.0)
    found = summarise(asked.items(said, {}, judge), asked.metrics)
    assert {m.value for name, m in found.items() if name not in ("empty", "refused", "unparsable")} == {7.75}
    assert sum("Model answer:" in s for s in judge.seen) == sum(bool(text) for turns in given for text in turns)
