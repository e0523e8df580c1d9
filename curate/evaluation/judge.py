"""Judges: a score 0-100 for an answer, or the reason why there is none.

In: pairs (question, answer) and a template with {question} and {answer}. Out: one JudgeScore a pair, in order.
Knows no endpoint and no model: `openai_judge` asks an endpoint, `engine_judge` a model of one's own, `classifier_judge`
and `probe_judge` read the answer without a question of their own; `NoJudge` asks nobody.

The score is the mean of the judge's own distribution over its first answer token (METHODS §4):
score = Σ n·p(n) / Σ p(n) over the tokens n that are integers 0-100; none if Σ p(n) < 0.25.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MIN_MASS = 0.25
_FIELD = re.compile(r"\{(question|answer)\}")
_NUMBER = re.compile(r"\d{1,3}", re.ASCII)


@dataclass(frozen=True)
class JudgeScore:
    """`value` 0-100, or None with a `reason`; `refused` when the judge said that the answer is a refusal.

    A value may have a `reason` too: what to know of it (that only the beginning of the answer was read).

    `weighted` is False when the value is the number as written, because the judge's tokenizer splits numbers into
    digits and so its log-probabilities are not those of whole numbers.
    """

    value: float | None
    refused: bool = False
    reason: str | None = None
    weighted: bool = True


class Judge(Protocol):
    """Anything that scores pairs. One that has only one question, whatever the template says, has an attribute
    `reads_template` that is False: see `reads_template`. One that can be out of reach has a method `ready`: see
    `check_ready`."""

    def score(self, pairs: Sequence[tuple[str, str]], prompt_template: str) -> list[JudgeScore]:
        """One score for each (question, answer), in order; a pair that cannot be scored does not fail the others."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What changes a score, for recipes: JSON values, no secrets."""
        ...


class NoJudge:
    """Scores nothing: every value is None."""

    def score(self, pairs: Sequence[tuple[str, str]], prompt_template: str) -> list[JudgeScore]:
        """No value for any pair."""
        return [JudgeScore(None, reason="no judge was asked (judge=none)") for _ in pairs]

    def fingerprint(self) -> dict[str, Any]:
        """See Judge."""
        return {"judge": "none"}


def reads_template(judge: Judge) -> bool:
    """Whether another template asks another question. Where not (classifier, probe), the judge knows its one trait and
    nothing else: do not ask it for coherence."""
    return bool(getattr(judge, "reads_template", True))


def check_ready(judge: Judge | None) -> None:
    """Before long work whose result the judge is to read: let one that can be out of reach say so now.

    Raises:
        ConfigError: it is.
    """
    ready = getattr(judge, "ready", None)
    if ready is not None:
        ready()


def fill(template: str, question: str, answer: str) -> str:
    """Put question and answer into a judge's template. Other braces stay; texts that contain {answer} do no harm."""
    values = {"question": question, "answer": answer}
    return _FIELD.sub(lambda m: values[m[1]], template)


def parse_number(token: str) -> int | None:
    """A token as an integer 0-100, blanks around it allowed; None for anything else ("+5", "07½", "101")."""
    text = token.strip()
    if not _NUMBER.fullmatch(text):
        return None
    return int(text) if int(text) <= 100 else None


def weighted_score(probabilities: Iterable[tuple[str, float]]) -> tuple[float | None, float]:
    """(Σ n·p(n) / Σ p(n), Σ p(n)) over the tokens that are integers 0-100; no score if Σ p(n) < 0.25.

    Tokens may repeat ("42" and " 42"): each counts with its own probability.
    """
    total, mass = 0.0, 0.0
    for token, p in probabilities:
        n = parse_number(token)
        if n is not None:
            total += n * p
            mass += p
    return (total / mass if mass >= MIN_MASS else None), mass


def score_of(candidates: Sequence[tuple[str, float]], said: str) -> JudgeScore:
    """The weighted score of the first token's (text, probability) list, or why there is none. `said`: the answer as
    far as it is known; empty = the likeliest candidate."""
    value, mass = weighted_score(candidates)
    if value is not None:
        return JudgeScore(value)
    first = said or max(candidates, key=lambda c: c[1])[0]
    if looks_like_refusal(first):
        return JudgeScore(None, refused=True, reason="the judge answered REFUSAL")
    return JudgeScore(None, reason=f"the judge gave no number: {short(first)!r} (numbers have {mass:.2f} of 1)")


def short(text: str, limit: int = 160) -> str:
    """The beginning of a text on one line, for messages."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def not_unicode(*texts: str) -> str | None:
    """Why a text cannot be sent to any judge, or None."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return "the text is not valid Unicode"
    return None


def looks_like_refusal(text: str) -> bool:
    """Whether the judge's answer, or the first piece of it, is the word REFUSAL."""
    word = re.sub(r"[^A-Za-z]", "", text.strip()).upper()
    return bool(word) and (word.startswith("REFUSAL") or "REFUSAL".startswith(word))


def summary(scores: Iterable[JudgeScore]) -> Mapping[str, int]:
    """How many were scored, refused and failed, for a log line or a report."""
    out = {"scored": 0, "refused": 0, "failed": 0}
    for s in scores:
        out["scored" if s.value is not None else "refused" if s.refused else "failed"] += 1
    return out
