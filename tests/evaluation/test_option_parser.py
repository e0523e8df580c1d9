"""The option parser against answers whose choice a reader would name, and against what must hold for any answer."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curate.evaluation.option_parser import parse_option

GAS = ("is standard weight and size", "is the opposite of variable", "only needs a few", "uses what it needs")
FISH = ("Deep sea animals", "fish", "Long Sea Fish", "Far Sea Animals")
VITAMINS = ("vitamin A", "vitamin C", "a dog", "D")
NUMBERS = ("1", "12", "2.5", "-3")
LISTED = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", GAS, strict=True))


def chosen(answer, options=GAS):
    index = parse_option(answer, options).index
    return None if index is None else "ABCDEFGHIJ"[index]


@pytest.mark.parametrize(
    ("answer", "letter", "rule"),
    [
        # the text and nothing else
        ("uses what it needs", "D", "text"),
        ("Uses what it needs.", "D", "text"),
        ('"Only needs a few!"', "C", "text"),
        # declared
        ("The answer is (B).", "B", "declared"),
        ("Answer: B", "B", "declared"),
        ("Answer:\nB", "B", "declared"),
        ("answer: c", "C", "declared"),
        ("the answer is a", "A", "declared"),
        ("The answer is A because gas fills it", "A", "declared"),
        ("The correct option is D: uses what it needs", "D", "declared"),
        ("The correct answer is option b.", "B", "declared"),
        ('the correct answer is "B"', "B", "declared"),
        ("The right answer would be B", "B", "declared"),
        ("The answer to the question is B", "B", "declared"),
        ("The answer is: B. is the opposite of variable", "B", "declared"),
        ("Sure! The answer is **(C) only needs a few**.", "C", "declared"),
        ("I choose B", "B", "declared"),
        ("I would go with option C.", "C", "declared"),
        ("I'd say C", "C", "declared"),
        ("I think A is wrong, so C", "C", "declared"),
        ("A is correct", "A", "declared"),
        ("B) is the opposite of variable is the correct answer", "B", "declared"),
        ("It's not A, it's B", "B", "declared"),
        ("The answer isn't A; it's D", "D", "declared"),
        ("The answer is not B but C.", "C", "letter"),
        ("answer is D, not A", "D", "declared"),
        ("B is not correct. The correct answer is A.", "A", "declared"),
        ("It could be A, but the answer is C", "C", "declared"),
        ("The answer is A. Wait, actually the answer is C.", "C", "declared"),
        ("B, C and D are wrong, so A", "A", "declared"),
        ("\\boxed{B}", "B", "declared"),
        ("$\\boxed{\\text{C}}$", "C", "declared"),
        ("Let me think.\nGas fills.\n\nD", "D", "declared"),
        ("Correct answer: A) is standard weight and size", "A", "declared"),
        ("The answer is uses what it needs.", "D", "declared"),
        (f"{LISTED}\nAnswer: D", "D", "declared"),
        # leading
        ("B", "B", "leading"),
        ("b", "B", "leading"),
        ("(b)", "B", "leading"),
        ("[C]", "C", "leading"),
        ("B.", "B", "leading"),
        ("**B**", "B", "leading"),
        ("Ｂ", "B", "leading"),
        ("a.", "A", "leading"),
        ("b) only", "B", "leading"),
        ("B) because it is", "B", "leading"),
        ("B: is the opposite of variable", "B", "leading"),
        ("B - is the opposite of variable", "B", "leading"),
        ("A because of its size", "A", "leading"),
        ("C, because A and B are wrong", "C", "leading"),
        ("Option D", "D", "leading"),
        ("D\n\nQuestion: What is x?\nA. foo\nB. bar\nAnswer: A", "D", "leading"),
        # marked, contained, letter
        ("Unlike (A), the gas is (C)", "C", "marked"),
        ("I like option C best", "C", "marked"),
        ("A liquid uses what it needs, I suppose", "D", "contained"),
        ("Gas fills, and C might do", "C", "letter"),
        ("Because of B, not because of A", "B", "letter"),
    ],
)
def test_answers_with_one_choice(answer, letter, rule):
    found = parse_option(answer, GAS)
    assert found.index == "ABCD".index(letter)
    assert found.rule == rule


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n",
        "I don't know",
        "None of the above",
        "Both A and B",
        "A or B",
        "A/B",
        "(A) or (B)",
        "Among (A), (B): I like both",
        "A, B, C, or D?",
        "The answer is both A and C",
        "The answer is A. The answer is C.",
        "The answer is not B.",
        "B is wrong. C is wrong. D is wrong.",
        "E",
        "The answer is E",
        "A dog is what I like",
        "a dog",
        "the answer is a dog",
        "I am a student",
        "U.S.A.",
        "C'est la vie",
        "A-level",
        LISTED,
        LISTED.replace(". ", ") ").replace("\n", " "),
        "It is standard or is the opposite of variable and uses what it needs",
    ],
)
def test_answers_without_one_choice(answer):
    assert chosen(answer) is None


@pytest.mark.parametrize(
    ("answer", "letter", "options"),
    [
        ("fish", "B", FISH),
        ("Long sea fish", "C", FISH),
        ("They are deep sea animals, I suppose", "A", FISH),
        ("They are Deep Sea Animals or fish", None, FISH),
        ("Vitamin C is the one", "B", VITAMINS),
        ("It is vitamin A", "A", VITAMINS),
        ("A dog", "C", VITAMINS),
        ("I think it's a dog.", "C", VITAMINS),
        ("B. fish", "B", FISH),
        ("C. fish", None, FISH),  # the letter says one thing, the text another
        ("The correct answer is A. Long Sea Fish.", None, FISH),
        ("A. fish\n\nThe correct answer is C. Long Sea Fish.", "C", FISH),
        ("12", "B", NUMBERS),
        ("1", "A", NUMBERS),
        ("So the answer is 1.", "A", NUMBERS),
        ("2 + 10 = 12", "B", NUMBERS),
        ("3", "C", ("1", "2", "3", "4")),
        ("1 + 2 = 3", None, ("1", "2", "3", "4")),
        ("O", "D", ("food", "water", "nutrients", "O")),
        ("bc", "A", ("bc", "a", "c")),
        ("B", "B", ("b", "a", "c")),  # a letter first of all
        ("The answer is 12", "B", NUMBERS),
        ("It is 2.5", "C", NUMBERS),
        ("same", None, ("same", "same", "other")),
        ("I think so", None, tuple("abcdefghij")),
        ("I", "I", tuple("abcdefghij")),
        ("The answer is I.", "I", tuple("abcdefghij")),
    ],
)
def test_texts_of_options(answer, letter, options):
    assert chosen(answer, options) == letter


@pytest.mark.parametrize("options", [[], ["x"] * 27])
def test_numbers_of_options_that_have_no_letters(options):
    with pytest.raises(ValueError, match="options"):
        parse_option("A", options)


WORDS = st.text(alphabet="abdefghjklmnopqrstuvwxyz", min_size=3, max_size=8)
TEXTS = st.lists(WORDS.map(lambda w: f"{w} {w[::-1]}x"), min_size=2, max_size=6, unique_by=str.casefold)
SAID = (
    "{L}",
    "({L})",
    "{L}.",
    "{L}) {text}",
    "({L}) {text}",
    "{L}. {text}",
    "{L}: {text}",
    "**{L}**",
    "The answer is {L}.",
    "The correct answer is ({L}) {text}.",
    "Answer: {L}",
    "Option {L}",
    "I choose {L}",
    "Well.\n\n{L}",
    "\\boxed{{{L}}}",
    "{text}",
    "{text}.",
    "The answer is {text}",
    "({l})",
    "{l}",
    "answer: {l}.",
)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, at=st.integers(0, 5), said=st.sampled_from(SAID), blank=st.sampled_from(["", " ", "\n", "\t\n"]))
def test_every_usual_form_is_read_for_every_option(texts, at, said, blank):
    """Every form names its option, blanks around it or not, and also after a copy of the list of options."""
    at %= len(texts)
    letter = "ABCDEF"[at]
    answer = said.format(L=letter, l=letter.lower(), text=texts[at])
    assert parse_option(blank + answer + blank, texts).index == at
    listed = "\n".join(f"{name}. {text}" for name, text in zip("ABCDEF", texts, strict=False))
    assert parse_option(f"{listed}\n\n{answer}", texts).index == at
    assert parse_option(listed, texts).index is None


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, order=st.randoms(use_true_random=False), at=st.integers(0, 5))
def test_an_answer_by_text_follows_its_option(texts, order, at):
    said = texts[at % len(texts)]
    shuffled = list(texts)
    order.shuffle(shuffled)
    found = parse_option(f"I suppose {said}", shuffled).index
    assert found is not None
    assert shuffled[found] == said


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, a=st.integers(0, 5), b=st.integers(0, 5), join=st.sampled_from([" and ", " or ", ", ", "/", " & "]))
def test_two_letters_together_are_no_choice(texts, a, b, join):
    a, b = a % len(texts), b % len(texts)
    found = parse_option(f"The answer is {'ABCDEF'[a]}{join}{'ABCDEF'[b]}.", texts).index
    assert found == (a if a == b else None)


@settings(max_examples=150, deadline=None)
@given(
    answer=st.one_of(
        st.text(max_size=80),
        st.lists(
            st.sampled_from(
                [
                    "A",
                    "B",
                    "(C)",
                    "d)",
                    "the answer is",
                    "not",
                    "is",
                    "wrong",
                    "so",
                    ".",
                    ",",
                    "\n",
                    "or",
                    "fish",
                    "Option",
                ]
            ),
            max_size=14,
        ).map(" ".join),
    ),
    options=st.lists(st.text(max_size=12), min_size=1, max_size=26),
)
@example("((((", ["(", ")"])
@example("\\boxed{", ["\\", "*"])
def test_any_answer_gives_one_result(answer, options):
    found = parse_option(answer, options)
    assert found == parse_option(answer, options)
    assert found.index is None or 0 <= found.index < len(options)
    assert found.rule != "none" or found.index is None


def test_long_answers_are_read_in_time():
    """Babble of a model that repeats itself: no pattern takes exponential time."""
    for piece in ("the answer is ", "A and ", "(A) ", "so it is not ", "fish ", "A.\n", "\\boxed{", "answer to "):
        parse_option(piece * 500, FISH)
