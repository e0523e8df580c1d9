"""Multiple choice on a toy file whose answers can be counted by hand, and on the real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from curate.errors import ConfigError
from curate.evaluation.base import Likelihood, summarise
from curate.evaluation.multiple_choice import MultipleChoice
from tests.real_data import real

ROWS = [
    {"id": "q1", "question": "Sky?", "choices": ["red", "blue", "green"], "answer": 1},
    {"id": "q2", "question": "Grass?", "choices": ["red", "blue", "green"], "answer": "C"},
    {"id": "q3", "question": "Blood?", "choices": ["red", "blue", "green"], "answer": "red"},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mcq.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return str(file)


def rewritten(path, **fields):
    row = {k: v for k, v in {**ROWS[0], **fields}.items() if v != "absent"}
    with open(path, "w") as f:
        f.write(json.dumps(row) + "\n")
    return path


def test_what_is_asked(path):
    asked = MultipleChoice(path, system="Be brief.")
    prompt = asked.prompts()[0]
    assert prompt.id == "q1"
    assert [m.role for m in prompt.messages] == ["system", "user"]
    assert prompt.messages[1].content == (
        "Sky?\n\nA. red\nB. blue\nC. green\n\nAnswer with the letter of the right option."
    )
    candidates = asked.candidates()
    assert [c.id for c in candidates[:4]] == ["q1/0", "q1/1", "q1/2", "q2/0"]
    assert [c.response for c in candidates[:3]] == ["red", "blue", "green"]
    assert candidates[0].messages[-1].content == "Sky?"
    assert asked.sampling.temperature == 0.0
    letters = MultipleChoice(path, scored="letter").candidates()
    assert [c.response for c in letters[:3]] == ["A", "B", "C"]
    assert letters[0].messages[-1].content.startswith("Sky?\n\nA. red")


def test_answers_are_counted(path):
    asked = MultipleChoice(path, by="generation")
    assert asked.candidates() == []
    items = asked.items({"q1": "B. blue", "q2": "A", "q3": "red or blue"}, {}, None)
    assert [i.values for i in items] == [
        {"accuracy": 1.0, "unparsed": 0.0},
        {"accuracy": 0.0, "unparsed": 0.0},
        {"accuracy": 0.0, "unparsed": 1.0},
    ]
    assert items[1].detail["chosen"] == "red"
    assert items[2].detail["rule"] == "contained"
    found = summarise(items, asked.metrics)
    assert found["accuracy"].value == pytest.approx(1 / 3)
    assert found["unparsed"].value == pytest.approx(1 / 3)


def test_an_answer_that_never_came_is_wrong_and_unparsed(path):
    items = MultipleChoice(path, by=["generation"]).items({"q1": "", "q2": "C"}, {}, None)
    assert [i.values["accuracy"] for i in items] == [0.0, 1.0, 0.0]
    assert [i.values["unparsed"] for i in items] == [1.0, 0.0, 1.0]


def test_likelihood_with_and_without_length(path):
    asked = MultipleChoice(path, by=["likelihood"])
    assert asked.prompts() == []
    given = {
        "q1/0": Likelihood(-4.0, 2),  # the likeliest as a whole
        "q1/1": Likelihood(-6.0, 6),  # the likeliest per token, and right
        "q1/2": Likelihood(-9.0, 3),
        "q2/0": Likelihood(-2.0, 2),
        "q2/1": Likelihood(-6.0, 2),
        "q2/2": Likelihood(-2.0, 2),  # right, and as likely as another
        "q3/0": Likelihood(-2.0, 2),
        "q3/1": Likelihood(-2.0, 2),  # one of q3's is missing: too long for the model
    }
    values = [i.values for i in asked.items({}, given, None)]
    assert values[0] == {"accuracy_likelihood": 1.0, "accuracy_likelihood_sum": 0.0}
    assert values[1] == {"accuracy_likelihood": 0.5, "accuracy_likelihood_sum": 0.5}
    assert values[2] == {"accuracy_likelihood": None, "accuracy_likelihood_sum": None}
    found = summarise(asked.items({}, given, None), asked.metrics)
    assert (found["accuracy_likelihood"].value, found["accuracy_likelihood"].missing) == (0.75, 1)


def test_shuffled_options_are_the_same_question(path):
    """Whatever the order shown, the right letter is right and likelihoods belong to their options."""
    orders = set()
    for seed in range(20):
        asked = MultipleChoice(path, shuffle=True, seed=seed)
        orders.add(asked.questions[0].order)
        answers, given = {}, {}
        for q, prompt in zip(asked.questions, asked.prompts(), strict=True):
            lines = prompt.messages[-1].content.split("\n")
            wanted = next(line for line in lines if line.endswith(f". {q.choices[q.right]}"))
            answers[q.id] = wanted[0]
        for c in asked.candidates():
            q = next(q for q in asked.questions if q.id == c.id.split("/")[0])
            given[c.id] = Likelihood(-1.0 if c.response == q.choices[q.right] else -2.0, 1)
        for item in asked.items(answers, given, None):
            assert item.values["accuracy"] == item.values["accuracy_likelihood"] == 1.0
    assert len(orders) == 6


def test_the_order_depends_on_seed_and_question_alone(path):
    whole = MultipleChoice(path, shuffle=True, seed=3)
    part = MultipleChoice(path, shuffle=True, seed=3, first=1, max_questions=1)
    assert part.questions == whole.questions[1:2]


def test_fingerprints_follow_what_changes_an_item(path, tmp_path):
    first = MultipleChoice(path).fingerprint()
    assert json.loads(json.dumps(first)) == first
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(Path(path).read_bytes())
    assert MultipleChoice(str(copy)).fingerprint() == first
    for change in ({"by": ["likelihood"]}, {"max_questions": 2}, {"instruction": ""}, {"scored": "letter"},
                   {"system": "x"}, {"shuffle": True, "seed": 1}):  # fmt: skip
        assert MultipleChoice(path, **change).fingerprint() != first


def test_choices_with_labels(path):
    nested = {"text": ["red", "blue"], "label": ["1", "2"]}
    asked = MultipleChoice(rewritten(path, choices=nested, answer="2"))
    assert (asked.questions[0].choices, asked.questions[0].right) == (("red", "blue"), 1)
    with pytest.raises(ConfigError, match="2 texts and 1 labels"):
        MultipleChoice(rewritten(path, choices={**nested, "label": ["1"]}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer": 3}, r"line 1: 'answer' is 3; expected the right option's index from 0 to 2"),
        ({"answer": True}, "'answer' is True"),
        ({"answer": "D"}, "'answer' is 'D'"),
        ({"answer": "absent"}, "line 1 has no field 'answer'"),
        ({"choices": ["one"]}, "'choices' holds 1 options; expected 2 to 26"),
        ({"choices": ["x"] * 27}, "'choices' holds 27 options"),
        ({"choices": ["x", "x"], "answer": "x"}, "'answer' is 'x'"),
        ({"question": ""}, "'question' is an empty text"),
    ],
)
def test_rows_that_cannot_be_used(path, fields, said):
    with pytest.raises(ConfigError, match=said):
        MultipleChoice(rewritten(path, **fields))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": ["guess"]}, "multiple_choice.by holds 'guess'"),
        ({"by": []}, "by is empty"),
        ({"scored": "tokens"}, "scored is 'tokens'"),
        ({"first": 3}, "holds 3 rows, so none is left"),
        ({"question": "text"}, "has no field 'text'"),
    ],
)
def test_options_that_cannot_be_used(path, options, said):
    with pytest.raises(ConfigError, match=said):
        MultipleChoice(path, **options)


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [("openbookqa_dev", 500, 4), ("openbookqa_test", 500, 4), ("commonsenseqa_dev", 1221, 5)],
)
def test_real_files(name, rows, options):
    asked = MultipleChoice(real(f"mcq/{name}.jsonl"), shuffle=True)
    assert len(asked.prompts()) == rows
    assert len(asked.candidates()) == rows * options
    asked = MultipleChoice(real(f"mcq/{name}.jsonl"), shuffle=True, max_questions=200)
    letters = {q.id: "ABCDE"[q.order.index(q.right)] for q in asked.questions}
    items = asked.items({k: f"The answer is {v}." for k, v in letters.items()}, {}, None)
    assert all(i.values["accuracy"] == 1.0 for i in items)
    # An answer by text is read too, but for texts that two options share.
    texts = {q.id: q.choices[q.right] for q in asked.questions}
    by_text = summarise(asked.items(texts, {}, None), asked.metrics)["accuracy"].value
    assert by_text > 0.98
    # Always "A" is right as often as chance, as options are shuffled.
    share = summarise(asked.items(dict.fromkeys(texts, "A"), {}, None), asked.metrics)["accuracy"].value
    assert abs(share - 1 / options) < 4 * math.sqrt(1 / options / 200)
