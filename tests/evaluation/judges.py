"""A judge that says what a test tells it to, and remembers what it was asked; and one that asks a test's endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from curate.evaluation.judge import JudgeScore, fill
from curate.evaluation.openai_judge import OpenAIJudge
from tests.evaluation.server import Endpoint, completion

TEMPLATE = "Q: {question}\nA: {answer}"
GOOD = completion([("80", {"80": 0.5, "60": 0.3, "REF": 0.2})])


def judge(endpoint: Endpoint, **changes: Any) -> OpenAIJudge:
    return OpenAIJudge("judge-model", **{"base_url": endpoint.url, "attempts": 3, "backoff": 0.0, **changes})


class Says:
    """`rule`: (question, answer, template) → a number, a JudgeScore, or None for no number."""

    def __init__(self, rule: Callable[[str, str, str], Any], reads_template: bool = True) -> None:
        self.rule = rule
        self.reads_template = reads_template
        self.calls: list[tuple[str, list[tuple[str, str]]]] = []

    @property
    def seen(self) -> list[str]:
        """The filled-in templates, in order."""
        return [fill(template, *pair) for template, pairs in self.calls for pair in pairs]

    def score(self, pairs: Sequence[tuple[str, str]], prompt_template: str) -> list[JudgeScore]:
        self.calls.append((prompt_template, list(pairs)))
        found = [self.rule(question, answer, prompt_template) for question, answer in pairs]
        return [
            f if isinstance(f, JudgeScore) else JudgeScore(f, reason=None if f is not None else "no number")
            for f in found
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {"judge": "says"}
