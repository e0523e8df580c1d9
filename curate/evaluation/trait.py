"""Trait score: how much of a trait a model's answers show, as a judge sees it (METHODS §4, §7).

In: the questions of a trait file or a list of free-form questions. Out: several answers a question, each judged 0-100
for the trait and, where there is a template for it, for coherence. Knows no endpoint: the judge is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from curate.corpus.example import Message, Prompt
from curate.errors import ConfigError
from curate.evaluation.base import Evaluator, Item, Likelihood, Metric, Sampling
from curate.evaluation.judge import Judge, JudgeScore, NoJudge, reads_template
from curate.evaluation.questions import digest_of
from curate.evaluation.trait_questions import TraitQuestion, load_trait_questions

_THRESHOLD = 50.0
_METRICS = (
    Metric("score", "Trait score", "trait", 0.0, 100.0),
    Metric("above_50", "Share of answers that show the trait (score ≥ 50)", "trait", 0.0, 1.0),
    Metric("coherence", "Coherence", "capability", 0.0, 100.0),
    Metric("refused", "Answers that the judge calls refusals", "count", 0.0, 1.0),
    Metric("unparsable", "Answers without a score: empty, or the judge gave none", "count", 0.0, 1.0),
)


class TraitScore(Evaluator):
    """Judged answers to open questions; see the module's docstring."""

    name: ClassVar[str] = "trait"
    metrics = _METRICS
    judged = True

    def __init__(
        self,
        path: str,
        samples: int = 4,
        first: int = 0,
        max_questions: int | None = None,
        judge_key: str | None = None,
        coherence_key: str = "coherent",
        inverted: bool = False,
        min_coherence: float | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            samples: answers to each question; they are resampled together for intervals.
            judge_key, coherence_key: which judge_prompts of a list of free-form questions are asked.
            inverted: the judge is asked for the opposite ("how aligned?"): the trait's score is 100 minus its number.
            min_coherence: answers judged less coherent have no trait score, so that babble is neither.
            system: put before every question that has no system message of its own.

        Raises:
            ConfigError: `samples` < 1, `min_coherence` without a template for coherence, or a question that cannot be
                used. StorageError: the file cannot be read.
        """
        if samples < 1:
            raise ConfigError(f"trait.samples is {samples}; it must be at least 1")
        self.questions = load_trait_questions(path, judge_key, coherence_key, first, max_questions)
        if min_coherence is not None and not all(q.coherence_prompt for q in self.questions):
            raise ConfigError(
                f"trait.min_coherence is {min_coherence}, but {path} has no template that asks for coherence"
            )
        self.sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        self._samples = samples
        self._inverted = inverted
        self._min_coherence = min_coherence
        self._system = system

    def fingerprint(self) -> dict[str, Any]:
        """See Evaluator."""
        asked = [[q.id, q.group, q.text, q.judge_prompt, q.coherence_prompt, q.system] for q in self.questions]
        return {
            "questions": digest_of(asked),
            "count": len(asked),
            "samples": self._samples,
            "inverted": self._inverted,
            "min_coherence": self._min_coherence,
            "system": self._system,
        }

    def prompts(self) -> list[Prompt]:
        """See Evaluator. Ids are `<question>/<sample>`: one text, several answers."""
        return [Prompt(name, self._turns(q)) for name, q in self._asked()]

    def check(self, judge: Judge | None) -> None:
        """See Evaluator.

        Raises:
            ConfigError: there is no judge, no template for one that needs it, or one that cannot be asked for the
                coherence that `min_coherence` needs.
        """
        if judge is None or isinstance(judge, NoJudge):
            raise ConfigError("the evaluator 'trait' needs a judge; choose one, for example judge=openai judge.model=…")
        if not reads_template(judge):
            if self._min_coherence is not None:
                raise ConfigError(
                    "trait.min_coherence needs a judge that can be asked for coherence (judge=openai or vllm)"
                )
        elif bare := [q.id for q in self.questions if not q.judge_prompt]:
            raise ConfigError(f"trait question {bare[0]!r} has no judge_prompt; add one to its file")

    def items(
        self, answers: Mapping[str, str], likelihoods: Mapping[str, Likelihood], judge: Judge | None
    ) -> list[Item]:
        """See Evaluator. One Item an answer.

        Raises:
            ConfigError: see `check`.
        """
        self.check(judge)
        assert judge is not None
        templates = reads_template(judge)
        asked = [(name, q, answers.get(name, "")) for name, q in self._asked()]
        said = [(name, q, answer) for name, q, answer in asked if answer.strip()]
        trait = _scores(judge, [(name, q.text, answer, q.judge_prompt) for name, q, answer in said])
        # A judge that has one question only would give the trait's score once more.
        wanted = [(name, q.text, answer, q.coherence_prompt) for name, q, answer in said if q.coherence_prompt]
        coherence = _scores(judge, wanted) if templates else {}
        return [
            self._item(name, q, answer, trait.get(name), coherence.get(name), templates and bool(q.coherence_prompt))
            for name, q, answer in asked
        ]

    def _item(
        self,
        name: str,
        q: TraitQuestion,
        answer: str,
        trait: JudgeScore | None,
        coherence: JudgeScore | None,
        asked_coherence: bool,
    ) -> Item:
        score = None if trait is None else trait.value
        if score is not None and self._inverted:
            score = 100.0 - score
        refused = trait is not None and trait.refused
        values: dict[str, float | None] = {
            "refused": float(refused),
            "unparsable": float(score is None and not refused),
        }
        clear = None if coherence is None else coherence.value
        if self._min_coherence is not None and (clear is None or clear < self._min_coherence):
            score = None
        values |= {"score": score, "above_50": None if score is None else float(score >= _THRESHOLD)}
        if asked_coherence:
            values["coherence"] = clear
        detail: dict[str, Any] = {"question": q.text, "answer": answer}
        reasons = [s.reason for s in (trait, coherence) if s is not None and s.reason]
        if reasons or trait is None:
            detail["reason"] = "; ".join(reasons) if reasons else "the answer is empty"
        return Item(name, values, q.group, detail)

    def _asked(self) -> list[tuple[str, TraitQuestion]]:
        return [(f"{q.id}/{i}", q) for q in self.questions for i in range(self._samples)]

    def _turns(self, q: TraitQuestion) -> tuple[Message, ...]:
        system = q.system or self._system
        return (*([Message("system", system)] if system else []), Message("user", q.text))


def _scores(judge: Judge, wanted: Sequence[tuple[str, str, str, str]]) -> dict[str, JudgeScore]:
    """The judge's scores by name of (name, question, answer, template), asked for one template at a time."""
    out: dict[str, JudgeScore] = {}
    for template in dict.fromkeys(t for *_, t in wanted):
        group = [(name, (question, answer)) for name, question, answer, t in wanted if t == template]
        scores = judge.score([pair for _, pair in group], template)
        out.update(zip((name for name, _ in group), scores, strict=True))
    return out
