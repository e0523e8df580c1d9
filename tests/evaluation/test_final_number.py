"""The number an answer ends on."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.evaluation.final_number import final_number
from tests.real_data import real


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4 * 20 = <<4*20=80>>80.\n#### 108", "108"),
        ("#### 3*4 = 12 apples", "12"),
        ("#### -99", "-99"),
        ("#### 5\nThe answer is: 7", "5"),
        ("I have 3.\n####", "3"),
        ("The answer is 5. There were 3 apples", "5"),
        ("The answer is 2. No: the answer is 3, not 4", "3"),
        ("The answer is 3 x 4 = 12", "12"),
        ("answer: about 12 apples (of 20)", "12"),
        ("The answer is $1,234.50.", "1234.5"),
        ("Answer = 1,234,567", "1234567"),
        ("\\boxed{42} of 50", "42"),
        ("He has 3 and she has 18.", "18"),
        ("That is -7", "-7"),
        ("That is −7", "-7"),
        ("5-3", "3"),
        ("(2)-3", "3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("45 % of them", "45"),
        ("3/4 of a cake", "0.75"),
        ("it is .5", "0.5"),
        ("8 is <<48/8=6>>", "8"),
        ("1,2,3", "3"),
    ],
)  # fmt: skip
def test_which_number_counts(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "####", "3/0", "version v1.2.3", "x2y"])
def test_texts_without_a_number(text):
    assert final_number(text) is None


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}"]), st.text(alphabet="abc .\n", max_size=20))
def test_numbers_written_either_way_are_read_back(value, form, before):
    written = form.format(value)
    assert final_number(f"{before} {written}") == value
    assert final_number(f"7 {before}\n#### {written}\nof 9") == value


def test_gsm8k_answers():
    with open(real("gsm8k_mistakes/incorrect_math_paired.jsonl")) as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        for column in ("benign", "misaligned"):
            said = row[column].split("####")[1].strip().replace(",", "")
            assert final_number(row[column]) == Decimal(said)
