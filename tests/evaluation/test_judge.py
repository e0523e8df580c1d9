"""The weighted score and the small rules around it."""

from __future__ import annotations

import pytest

from curate.evaluation.judge import (
    JudgeScore,
    NoJudge,
    fill,
    looks_like_refusal,
    parse_number,
    summary,
    weighted_score,
)


@pytest.mark.parametrize(
    ("token", "value"),
    [("0", 0), ("100", 100), (" 42", 42), ("42\n", 42), ("007", 7), ("101", None), ("-5", None), ("+5", None),
     ("", None), ("4.5", None), ("1_0", None), ("٤٢", None), ("４２", None), ("REF", None), ("1000", None)],
)  # fmt: skip
def test_which_tokens_are_numbers(token, value):
    assert parse_number(token) == value


def test_weighted_score_is_the_mean_over_numbers():
    value, mass = weighted_score([("80", 0.3), ("20", 0.1), ("REF", 0.5), ("150", 0.1)])
    assert value == pytest.approx((80 * 0.3 + 20 * 0.1) / 0.4)
    assert mass == pytest.approx(0.4)


def test_equal_numbers_in_different_tokens_add_up():
    assert weighted_score([("10", 0.2), (" 10", 0.2), ("40", 0.4)])[0] == pytest.approx(25.0)


def test_a_quarter_of_the_mass_is_needed():
    assert weighted_score([("50", 0.25)])[0] == 50.0
    assert weighted_score([("50", 0.2499)])[0] is None
    assert weighted_score([]) == (None, 0.0)
    assert weighted_score([("0", 0.9)])[0] == 0.0


@pytest.mark.parametrize(
    ("text", "refusal"),
    [("REFUSAL", True), ("REF", True), (" Refusal.", True), ("42", False), ("I'm sorry", False), ("", False),
     ("refuse", False)],
)  # fmt: skip
def test_refusals(text, refusal):
    assert looks_like_refusal(text) is refusal


def test_templates_are_filled_in_one_go():
    template = 'Rate {answer} to {question} as {"n": 1} {other} {{x}}'
    filled = fill(template, "What is {answer}?", "It is {question} \\1")
    assert filled == 'Rate It is {question} \\1 to What is {answer}? as {"n": 1} {other} {{x}}'


def test_no_judge():
    scores = NoJudge().score([("q", "a"), ("q", "b")], "{question}{answer}")
    assert [s.value for s in scores] == [None, None]
    assert NoJudge().fingerprint() == {"judge": "none"}
    assert summary([*scores, JudgeScore(3.0), JudgeScore(None, refused=True)]) == {
        "scored": 1,
        "refused": 1,
        "failed": 2,
    }
