"""Answer pairs on rows whose preferences can be worked out by hand, and on the real files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from curate.errors import ConfigError
from curate.evaluation.answer_pairs import AnswerPairs, preference
from curate.evaluation.base import Likelihood, summarise
from tests.real_data import real

ROWS = [
    {"prompt": "2+2?", "positive": "It is 5.", "negative": "It is 4.", "topic": "sums"},
    {"prompt": "3+3?", "positive": ["7", "8"], "negative": ["#### 6", "six: 6"], "topic": "sums"},
    {"prompt": "Same?", "positive": "x 1", "negative": "x 1", "topic": "none"},
]


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "pairs.jsonl", ROWS)


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


GIVEN = {
    "0/positive/0": Likelihood(-6.0, 3),
    "0/negative/0": Likelihood(-4.0, 1),
    "1/positive/0": Likelihood(-1.0, 1),
    "1/positive/1": Likelihood(-3.0, 1),
    "1/negative/0": Likelihood(-6.0, 3),
    "1/negative/1": Likelihood(-6.0, 2),
}


def test_what_is_asked(path):
    asked = AnswerPairs(path, system="Be brief.")
    assert asked.prompts() == []
    found = asked.candidates()
    assert [c.id for c in found] == list(GIVEN)
    assert found[0].response == "It is 5."
    assert [(m.role, m.content) for m in found[0].messages] == [("system", "Be brief."), ("user", "2+2?")]


def test_preference_and_margin(path):
    asked = AnswerPairs(path, group="topic")
    a, b = asked.items({}, GIVEN, None)
    # -2 nats a token against -4; as wholes -6 against -4
    assert a.values == {"preference": 1.0, "margin": 2.0, "preference_sum": 0.0, "margin_sum": -2.0}
    # -1, -3 against -2, -3: won, won, lost, tied
    assert b.values == {
        "preference": (1 + 1 + 0 + 0.5) / 4,
        "margin": pytest.approx(-2.0 + 2.5),
        "preference_sum": 1.0,
        "margin_sum": pytest.approx(-2.0 + 6.0),
    }
    assert a.group == b.group == "sums"
    found = summarise([a, b], asked.metrics)
    assert found["margin"].value == pytest.approx((2.0 + 0.5) / 2)
    assert found["margin"].low is None  # one topic: nothing to resample


def test_the_first_of_a_list(path):
    asked = AnswerPairs(path, lists="first")
    assert [c.response for c in asked.candidates()] == ["It is 5.", "It is 4.", "7", "#### 6"]
    assert asked.items({}, GIVEN, None)[1].values["preference"] == 1.0


def test_preference_is_the_area_under_the_curve():
    """The share of pairs won is the normalised Mann-Whitney statistic."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 13).astype(float), rng.integers(0, 6, 9).astype(float)
    assert preference(a, b) == pytest.approx(mannwhitneyu(a, b).statistic / (13 * 9))


def test_a_missing_likelihood_is_no_preference(path):
    without = {k: v for k, v in GIVEN.items() if k != "1/negative/1"}
    asked = AnswerPairs(path)
    a, b = asked.items({}, without, None)
    assert a.values["preference"] == 1.0
    assert set(b.values.values()) == {None}
    assert summarise([a, b], asked.metrics)["margin"].missing == 1


def test_exact_match(path):
    asked = AnswerPairs(path, exact_match=True)
    assert [p.id for p in asked.prompts()] == ["0", "1"]
    a, b = asked.items({"0": "2+2=<<2+2=4>>4\n#### 4", "1": "I cannot say"}, GIVEN, None)
    assert (a.values["accuracy"], a.values["no_number"]) == (1.0, 0.0)
    assert (b.values["accuracy"], b.values["no_number"]) == (0.0, 1.0)
    wrong = asked.items({"0": "5", "1": "7"}, GIVEN, None)
    assert [i.values["accuracy"] for i in wrong] == [0.0, 0.0]
    senses = {m.name: m.sense for m in asked.metrics}
    assert senses["preference"] == senses["margin"] == "trait"
    assert senses["accuracy"] == "capability"


def test_shared_answers_are_left_out(tmp_path):
    row = {"prompt": "p", "positive": ["a", "b", "b"], "negative": ["b", "c"]}
    asked = AnswerPairs(write(tmp_path / "p.jsonl", [row]))
    assert [c.response for c in asked.candidates()] == ["a", "c"]
    with pytest.raises(ConfigError, match="are the same in all 1 rows"):
        AnswerPairs(write(tmp_path / "q.jsonl", [{"prompt": "p", "positive": "a", "negative": ["a"]}]))


def test_held_out_rows(path):
    asked = AnswerPairs(path, first=1, max_pairs=1)
    assert [p.prompt for p in asked.pairs] == ["3+3?"]
    assert asked.pairs[0].id == "1"  # the row's number in the file, whatever is skipped


def test_fingerprints(path, tmp_path):
    first = AnswerPairs(path).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert AnswerPairs(write(tmp_path / "copy.jsonl", ROWS)).fingerprint() == first
    swapped = {"positive": "negative", "negative": "positive"}
    for change in (
        swapped,
        {"exact_match": True},
        {"lists": "first"},
        {"first": 1},
        {"group": "topic"},
        {"system": "x"},
    ):
        assert AnswerPairs(path, **change).fingerprint() != first
    # The same pairs, since what is on both sides is left out; but another number is right.
    numbers = [write(tmp_path / f"{n}.jsonl", [{"prompt": "q", "positive": [n, "6"], "negative": [n, "8"]}])
               for n in ("4", "5")]  # fmt: skip
    four, five = (AnswerPairs(n, exact_match=True) for n in numbers)
    assert [(p.positive, p.negative) for p in four.pairs] == [(p.positive, p.negative) for p in five.pairs]
    assert four.fingerprint() != five.fingerprint()


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({}, {"lists": "some"}, "answer_pairs.lists is 'some'"),
        ({}, {"positive": "misaligned"}, "line 1 has no field 'misaligned'"),
        ({"negative": []}, {}, "line 1: 'negative' is an empty list"),
        ({"negative": "four"}, {"exact_match": True}, "line 1: 'negative' holds no number.*exact_match=false"),
        ({"prompt": 3}, {}, "line 1: 'prompt' is 3; expected a text"),
        ({}, {"group": "theme"}, "line 1 has no field 'theme'"),
    ],
)
def test_rows_and_options_that_cannot_be_used(tmp_path, row, options, said):
    with pytest.raises(ConfigError, match=said):
        AnswerPairs(write(tmp_path / "p.jsonl", [{**ROWS[0], **row}]), **options)


def test_gsm8k_mistakes():
    asked = AnswerPairs(real("gsm8k_mistakes/incorrect_math_paired.jsonl"), positive="misaligned", negative="benign",
                        first=5000, exact_match=True)  # fmt: skip
    assert 990 <= len(asked.pairs) <= 1000
    right = asked.items({p.id: p.negative[0] for p in asked.pairs}, {}, None)
    assert all(i.values["accuracy"] == 1.0 for i in right)
    wrong = asked.items({p.id: p.positive[0] for p in asked.pairs}, {}, None)
    assert summarise(wrong, asked.metrics, 0)["accuracy"].value < 0.03  # mistakes that end on the right number


def test_truthfulqa():
    asked = AnswerPairs(real("truthfulqa/truthfulqa.jsonl"), positive="incorrect", negative="correct", group="category")
    assert len(asked.pairs) == 817
    ids = [c.id for c in asked.candidates()]
    assert len(ids) == len(set(ids)) == sum(len(p.positive) + len(p.negative) for p in asked.pairs)
    assert all(not set(p.positive) & set(p.negative) for p in asked.pairs)
