"""Coloured tokens: the text stays what it is, the strongest token has the strongest colour, foreign text is escaped."""

from __future__ import annotations

import html
import re

import pytest

from curate.reports.tokens import LEVELS, coloured, scale

TOKENS = (("You", 0.4), (" are", -0.1), (" so", 0.01), (" right", 0.8), (".", -0.8))


def bare(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def classes(markup: str) -> dict[str, str]:
    return {bare(text): name for name, text in re.findall(r'<span class="(\w+)"[^>]*>(.*?)</span>', markup)}


def test_colour_is_the_share_of_the_strongest_token():
    got = coloured(TOKENS, 700, 6000, 100)
    assert bare(got["head"]) == "You are so right."
    assert classes(got["head"]) == {"You": "up2", " are": "down1", " right": "up4", ".": "down4"}
    assert 'title="+0.400"' in got["head"]
    assert 'title="−0.100"' in got["head"]
    assert (got["rest"], got["left_out"], got["plain"]) == ("", 0, False)


def test_the_scale_shows_every_colour_there_is():
    assert [name for name, _ in scale()] == ["down4", "down3", "down2", "down1", "", "up1", "up2", "up3", "up4"]
    assert len(scale()) == 2 * LEVELS + 1


def test_a_fold_in_the_middle_of_a_token_loses_nothing():
    tokens = [(f" word{i}abc", (-1) ** i * (i + 1)) for i in range(300)]
    text = "".join(t for t, _ in tokens)
    got = coloured(tokens, 503, 2000, 1000)
    assert bare(got["head"]) + bare(got["rest"]) == text[:2000]
    assert got["shown"] == len(bare(got["head"]))
    assert got["left_out"] == len(text) - 2000
    assert got["whole"] == len(text)


def test_only_so_many_tokens_are_coloured_the_strongest_ones():
    tokens = [(f"<{i}>", float(i + 1)) for i in range(50)]
    got = coloured(tokens, 700, 6000, 10)
    assert set(classes(got["head"])) == {f"<{i}>" for i in range(40, 50)}
    assert bare(got["head"]) == "".join(t for t, _ in tokens)


@pytest.mark.parametrize("values", [(0.0, 0.0), (float("nan"), float("nan"))])
def test_without_a_value_the_text_is_plain(values):
    got = coloured([("a<", values[0]), ("b", values[1])], 700, 6000, 10)
    assert got["plain"]
    assert got["head"] == "a&lt;b"


def test_a_token_without_a_value_among_others_has_no_colour():
    got = coloured([("a", float("nan")), ("b", 1.0), ("c", float("inf"))], 700, 6000, 10)
    assert classes(got["head"]) == {"b": "up4"}


def test_foreign_text_is_escaped_and_hidden_characters_are_bounded():
    got = coloured([("<script>\u202e", 1.0), ("&", -1.0)], 700, 6000, 10)
    assert "<script>" not in got["head"]
    assert "\u202e" not in got["head"]
    many = coloured([("\u200b", 1.0), ("x", 0.5)] * 2000, 700, 6000, 10_000)
    assert many["plain"]
    assert len(many["head"]) + len(many["rest"]) < 200_000
