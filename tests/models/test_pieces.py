"""Pieces join to the text, whatever the bytes."""

from __future__ import annotations

import pytest

from curate.models.pieces import token_pieces
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    "text", ["", "You are absolutely right!", " two  spaces\n\nand\ttabs ", "naïve — 你好 👩‍👩‍👧 शब्द", "\u202e<b>&"]
)
def test_the_pieces_are_the_text(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_is_the_last_ones():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a👩b", add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert [p for p in pieces if p] == ["a", "👩", "b"]
    assert pieces[1:-2] == [""] * (len(ids) - 3)


def test_a_cut_character_is_marked_as_broken():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a👩", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(token_pieces(tokenizer, ids)).startswith("a\ufffd")
