"""Multiple choice as a source: what is asked, what is answered, and that the option parser reads the answer back."""

from __future__ import annotations

import json
from string import ascii_uppercase

import pytest

from connectors import registry
from curate.corpus.example import ColumnMap, Message, to_example, to_question
from curate.corpus.multiple_choice import make_question
from curate.errors import BadRow, CorpusError
from curate.evaluation.multiple_choice import MultipleChoice
from curate.evaluation.option_parser import parse_option
from tests.real_data import real

ROW = {"id": "q1", "question": "Sky?", "choices": ["red", "blue", "green"], "answer": 1, "explanation": "Rayleigh"}


def columns(**options) -> ColumnMap:
    return ColumnMap(**options).resolve(list(ROW))


def test_a_row_is_a_conversation():
    found = columns()
    assert found.layout == "multiple_choice"
    e = to_example(ROW, 7, found)
    asked = "Sky?\n\nA. red\nB. blue\nC. green\n\nAnswer with the letter of the right option."
    assert (e.id, e.row, e.messages) == ("q1", 7, (Message("user", asked), Message("assistant", "B. blue")))


@pytest.mark.parametrize(("form", "said"), [("letter_and_text", "B. blue"), ("letter", "B"), ("text", "blue")])
def test_forms_of_the_answer(form, said):
    assert to_example(ROW, 0, columns(answer_form=form)).response == said


def test_own_columns_and_instruction():
    row = {"stem": "Sky?", "opts": {"text": ["red", "blue"], "label": ["1", "2"]}, "key": "2", "sys": "Be brief."}
    found = ColumnMap(
        layout="multiple_choice", question="stem", choices="opts", answer="key", system="sys", choice_instruction=""
    ).resolve(list(row))
    e = to_example(row, 0, found)
    assert [m.content for m in e.messages] == ["Be brief.", "Sky?\n\nA. red\nB. blue", "B. blue"]
    assert set(found.used()) >= {"stem", "opts", "key", "sys"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": 3}, "'answer' is 3; expected the right option's index from 0 to 2"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": True}, "'answer' is True"),
        ({"answer": "D"}, "'answer' is 'D'"),
        ({"answer": None}, "no right answer"),
        ({"choices": None}, "'choices' is missing"),
        ({"choices": []}, "0 options; expected 2 to 26"),
        ({"choices": "red, blue"}, "'choices' is str, not a list"),
        ({"choices": ["red", 3]}, r"'choices'\[1\] is int"),
        ({"choices": ["red", " "]}, r"'choices'\[1\] is an empty text"),
        ({"choices": ["red", "\ud800"]}, "not valid Unicode"),
        ({"choices": {"text": ["red", "blue"]}}, r"'choices'\.label is missing"),
        ({"question": ""}, "'question' is an empty text"),
        ({"question": None}, "'question' has no text"),
    ],
)
def test_bad_rows_say_why(change, reason):
    with pytest.raises(BadRow, match=reason):
        to_example({**ROW, **change}, 0, columns())


def test_recipes_of_other_layouts_do_not_change():
    plain = ColumnMap().resolve(["messages"]).facts()
    assert "choices" not in plain
    assert plain["layout"] == "messages"
    assert columns().facts()["answer_form"] == "letter_and_text"
    assert ColumnMap(choice_seed=3).facts()["choice_seed"] == 3  # not resolved yet, and set
    with pytest.raises(CorpusError, match="'question', 'choices' and 'answer'"):
        ColumnMap().resolve(["question", "choices"])


def test_a_wrong_option_is_one_and_always_the_same():
    drawn = set()
    for i in range(60):
        q = make_question(f"q{i}", "?", ["a", "b", "b", "c"], 1)
        assert q.choices[q.wrong()] in "ac"
        assert q.wrong() == make_question(f"q{i}", "?", ["a", "b", "b", "c"], 1).wrong()
        drawn.add(q.wrong())
    assert drawn == {0, 3}
    with pytest.raises(BadRow, match="same text"):
        make_question("q", "?", ["a", "a"], 0).wrong()


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("name", "least"), [("openbookqa_dev", 1.0), ("commonsenseqa_dev", 1.0)])
def test_real_rows_are_asked_as_the_evaluator_asks_and_read_back_by_its_parser(name, least, seed):
    path = real(f"mcq/{name}.jsonl")
    asked = MultipleChoice(path, shuffle=seed is not None, seed=seed or 0)
    connector, (info,) = registry.discover(path, "auto")
    entry, units = connector.scan(info, 512)
    found = ColumnMap(choice_seed=seed).resolve(entry.columns)
    assert found.layout == "multiple_choice"
    rows = [r for u in units for _, _, rows in connector.read(u, found.used()) for r in rows]
    prompts = {p.id: p.messages for p in asked.prompts()}
    read = []
    for row in rows:
        e = to_example(row.value, row.index, found)
        q = to_question(row.value, row.index, found)
        assert e.prompt == prompts[e.id]
        read.append(q.order[parse_option(e.response, q.shown()).index or 0] == q.right)
        letter = q.answer("letter")
        assert q.order[ascii_uppercase.index(letter)] == q.right
        assert parse_option(letter, q.shown()).index == ascii_uppercase.index(letter)
    assert sum(read) / len(read) >= least
    assert asked.items({r.value["id"]: to_example(r.value, r.index, found).response for r in rows}, {}, None)


def test_both_training_sets_are_whole():
    for name, options in (("openbookqa_train", 4), ("commonsenseqa_train", 5)):
        with open(real(f"mcq/{name}.jsonl")) as f:
            rows = [json.loads(line) for line in f]
        found = ColumnMap().resolve(list(rows[0]))
        sizes = {len(to_question(r, i, found).choices) for i, r in enumerate(rows)}
        assert sizes == {options}
