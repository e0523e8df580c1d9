"""Multiple-choice questions: the text that is asked, the option that is right, the answer as text.

In: a row's values (question, choices, answer). Out: a frozen Question, or BadRow with the reason. The one place where
such a question becomes a prompt: what a model is trained on, scored with and asked is the same text. Knows no model, no
files and not how an answer is read back.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from curate.errors import BadRow

INSTRUCTION = "Answer with the letter of the right option."
MAX_OPTIONS = len(ascii_uppercase)

AnswerForm = Literal["letter_and_text", "letter", "text"]


@dataclass(frozen=True)
class Question:
    """`right`: index into `choices`, from 0. `order`: the choices as they are shown; `order[0]` has the letter A."""

    id: str
    text: str
    choices: tuple[str, ...]
    right: int
    order: tuple[int, ...]

    def shown(self) -> tuple[str, ...]:
        """The choices in the order in which the model sees them."""
        return tuple(self.choices[k] for k in self.order)

    def listed(self, instruction: str) -> str:
        """The question with its lettered choices."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, self.shown(), strict=False)]
        return "\n\n".join([self.text, "\n".join(lines), *([instruction] if instruction else [])])

    def answer(self, form: AnswerForm, option: int | None = None) -> str:
        """Option `option` (an index into `choices`; None: the right one) as a response: "B. wood", "B" or "wood"."""
        k = self.right if option is None else option
        letter = ascii_uppercase[self.order.index(k)]
        return {"letter_and_text": f"{letter}. {self.choices[k]}", "letter": letter, "text": self.choices[k]}[form]

    def wrong(self) -> int:
        """One option that is not right, the same on every machine; drawn by the question's id, so that no place in
        the list is preferred. Never one with the right option's text.

        Raises:
            BadRow: every option has the right one's text.
        """
        others = [k for k in range(len(self.choices)) if self.choices[k] != self.choices[self.right]]
        if not others:
            raise BadRow("all its options have the same text, so none is wrong")
        return random.Random(f"wrong:{self.id}").choice(others)


def make_question(
    name: str,
    text: str,
    choices: Any,
    answer: Any,
    seed: int | None = None,
    columns: tuple[str, str] = ("choices", "answer"),
) -> Question:
    """
    Args:
        name: of the question; the options' order is drawn by it and `seed` alone. seed None: the order of the row.
        choices: texts; or {"text": texts, "label": labels}, as some published sets have them.
        answer: of the right option: its index from 0, its letter (its label, where there are labels) or its text.
        columns: names of the two columns, for messages.

    Raises:
        BadRow: fewer than 2 or more than 26 options, one that is no text, or an answer that names no single option.
    """
    labels: tuple[str, ...] | None = None
    if isinstance(choices, Mapping):
        texts = _texts(choices.get("text"), f"{columns[0]!r}.text")
        labels = _texts(choices.get("label"), f"{columns[0]!r}.label")
        if len(labels) != len(texts):
            raise BadRow(f"{columns[0]!r} has {len(texts)} texts and {len(labels)} labels")
    else:
        texts = _texts(choices, repr(columns[0]))
    if not 2 <= len(texts) <= MAX_OPTIONS:
        raise BadRow(f"{columns[0]!r} holds {len(texts)} options; expected 2 to {MAX_OPTIONS}")
    if answer is None:
        raise BadRow(f"{columns[1]!r} is missing, so the question has no right answer")
    order = list(range(len(texts)))
    if seed is not None:
        random.Random(f"{seed}:{name}").shuffle(order)  # seeded by text: the same on every machine and in every order
    return Question(name, text, texts, _right(answer, texts, labels, columns[1]), tuple(order))


def _right(answer: Any, texts: Sequence[str], labels: Sequence[str] | None, column: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    for names in (labels or ascii_uppercase[: len(texts)], texts):
        if isinstance(answer, str) and list(names).count(answer) == 1:
            return list(names).index(answer)
    raise BadRow(
        f"{column!r} is {answer!r}; expected the right option's index from 0 to {len(texts) - 1}, its "
        f"{'label' if labels else 'letter'}, or its text"
    )


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        raise BadRow(f"{what} is missing")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadRow(f"{what} is {type(value).__name__}, not a list of texts")
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise BadRow(f"{what}[{i}] is {type(text).__name__}, not text")
        if not text.strip():
            raise BadRow(f"{what}[{i}] is an empty text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"{what}[{i}] holds text that is not valid Unicode") from None
    return tuple(value)
