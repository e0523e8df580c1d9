from __future__ import annotations

import pytest

from curate.corpus.example import ColumnMap, Message, content_id, to_example
from curate.errors import BadRow, CorpusError


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def messages(**kw) -> ColumnMap:
    return ColumnMap(**kw).resolve(["messages", "label", "id"])


def test_messages_end_with_the_last_assistant_turn():
    row = chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    e = to_example(row, 7, messages())
    assert [m.content for m in e.messages] == ["s", "a", "b", "c", "d"]
    assert (e.row, e.response, [m.role for m in e.prompt]) == (7, "d", ["system", "user", "assistant", "user"])


def test_prompt_response_and_alpaca_map_onto_messages():
    qa = ColumnMap(prompt="q", response="a", system="s").resolve(["q", "a", "s"])
    e = to_example({"q": "why?", "a": "because", "s": "be brief"}, 0, qa)
    assert e.messages == (Message("system", "be brief"), Message("user", "why?"), Message("assistant", "because"))
    alpaca = ColumnMap().resolve(["instruction", "input", "output"])
    assert alpaca.layout == "alpaca"
    e = to_example({"instruction": "add", "input": "1 2", "output": "3"}, 0, alpaca)
    assert e.prompt == (Message("user", "add\n\n1 2"),)
    assert to_example({"instruction": "hi", "input": "", "output": "3"}, 0, alpaca).prompt == (Message("user", "hi"),)


def test_sharegpt_keys_and_roles():
    columns = ColumnMap(messages="conversations", role_key="from", content_key="value").resolve(["conversations"])
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert [m.role for m in to_example(row, 0, columns).messages] == ["user", "assistant"]


def test_content_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]}
    assert to_example(row, 0, messages()).response == "ab"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(("user", "q")), "no assistant turn"),
        (chat(), "no assistant turn"),
        (chat(("user", "q"), ("assistant", "  \n")), "empty"),
        (chat(("assistant", "a")), "no turn before"),
        ({"messages": None}, "'messages' is missing"),
        ({"messages": "text"}, "not a list"),
        ({"messages": ["text"]}, "not an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        (chat(("user", "\ud800"), ("assistant", "a")), "not valid Unicode"),
    ],
)
def test_bad_rows_say_why(row, reason):
    with pytest.raises(BadRow, match=reason):
        to_example(row, 0, messages())


def test_ids_are_given_or_hashes_of_the_content():
    row = chat(("user", "q"), ("assistant", "a"))
    first, second = to_example(row, 0, messages()), to_example({**row, "label": "x"}, 9, messages(label="label"))
    assert first.id == second.id == content_id(first.messages)
    assert len(first.id) == 32
    assert to_example({**row, "id": 17}, 0, messages()).id == "17"
    # The border between turns is part of the hash.
    assert content_id([Message("user", "ab")]) != content_id([Message("user", "a"), Message("user", "b")])


def test_unknown_column_names_near_ones():
    with pytest.raises(CorpusError, match=r"no column 'lable'; did you mean 'label'"):
        ColumnMap(label="lable").resolve(["messages", "label"], "x.jsonl")
    with pytest.raises(CorpusError, match=r"x\.jsonl has the columns \['text'\].*fit no known layout"):
        ColumnMap().resolve(["text"], "x.jsonl")
