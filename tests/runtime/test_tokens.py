"""The tokens stage against the renderer; made once, and a larger run adds to it."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from curate.errors import CorpusError
from curate.runtime.output import read_parts
from curate.training.rows import PART_COLUMNS, load_rows
from tests.conftest import conversation, write_jsonl
from tests.runtime.training import Trained


def rendered(model, row: dict) -> tuple[list[int], str]:
    """Ids up to the end of turn, and the text that is learned."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    whole = text[: text.rindex("<|im_end|>") + len("<|im_end|>")]
    return tokenizer(whole, add_special_tokens=False)["input_ids"], row["messages"][-1]["content"] + "<|im_end|>"


def test_tokens_of_rows(corpus, model, tmp_path):
    made = Trained(corpus, model, tmp_path / "store")
    assert (made.tokens.rows, made.result.rows) == (100, 100)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load_rows(made.tokens.parts, None, tmp_path, lambda urls: read_parts(urls, PART_COLUMNS))
    for i in (0, 59, 60, 99):  # first and last of both files
        ids, learned = rendered(model, conversation(i))
        assert rows[i]["input_ids"] == ids
        assert tokenizer.decode(ids[rows[i]["start"] :]) == learned


def test_made_once_and_added_to(corpus, model, tmp_path):
    few = Trained(corpus, model, tmp_path / "store", max_rows=70)
    assert (few.tokens.rows, few.result.rows, len(few.tokens.parts)) == (70, 70, 4)
    more = Trained(corpus, model, tmp_path / "store")
    assert (more.result.rows, more.result.already) == (30, 70)
    assert more.tokens.digest == few.tokens.digest
    again = Trained(corpus, model, tmp_path / "store", max_rows=70)
    assert again.result.rows == 0
    # Parts of the larger run hold rows that are not of the smaller one.
    assert (again.spec().recipe.digest, few.spec().recipe.digest) == (few.spec().recipe.digest,) * 2
    rows = load_rows(again.tokens.parts, None, tmp_path, lambda urls: read_parts(urls, PART_COLUMNS))
    assert len(rows) == 70


def test_bad_rows_keep_their_place(model, tmp_path):
    lines = [conversation(i) for i in range(20)]
    lines[7] = {"id": "r7", "messages": [{"role": "user", "content": "nobody answers"}]}
    write_jsonl(tmp_path / "corpus" / "a.jsonl", lines)
    made = Trained(tmp_path / "corpus", model, tmp_path / "store")
    assert (made.tokens.rows, made.result.quarantined) == (20, 1)
    (quarantine,) = (tmp_path / "store").rglob("quarantine/a.jsonl/*.jsonl")
    assert json.loads(quarantine.read_text())["row"] == 7
    write_jsonl(tmp_path / "bad" / "a.jsonl", [lines[7]] * 20)
    with pytest.raises(CorpusError, match="20 of 20 rows are bad"):
        Trained(tmp_path / "bad", model, tmp_path / "store")
