"""Multiple choice: how often a model picks the right option (METHODS §5, §7).

In: a file of questions with options and the right one. Out: per question whether the option that a deterministic
parser reads from the model's answer is the right one (`by: generation`), and whether the right option is the likeliest
(`by: likelihood`). Knows no model.

Options may be shuffled, so that a model that always says A gains nothing from how a file was made; the order depends
on the seed and the question's id alone, and everything reported is in the file's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, ClassVar

from curate.corpus.example import Message, Prompt
from curate.corpus.multiple_choice import INSTRUCTION, Question, make_question
from curate.errors import BadRow, ConfigError, near
from curate.evaluation.base import Candidate, Evaluator, Item, Likelihood, Metric, Sampling
from curate.evaluation.judge import Judge
from curate.evaluation.option_parser import parse_option
from curate.evaluation.questions import Row, check_names, digest_of, read_rows

_BY = ("generation", "likelihood")
_SCORED = ("text", "letter")
_METRICS = {
    "generation": (
        Metric("accuracy", "Accuracy", "capability", 0.0, 1.0),
        Metric("unparsed", "Answers that choose no single option", "count", 0.0, 1.0),
    ),
    "likelihood": (
        Metric("accuracy_likelihood", "Accuracy by likelihood per token", "capability", 0.0, 1.0),
        Metric("accuracy_likelihood_sum", "Accuracy by likelihood", "capability", 0.0, 1.0),
    ),
}


class MultipleChoice(Evaluator):
    """Accuracy on questions with one right option; see the module's docstring."""

    name: ClassVar[str] = "multiple_choice"

    def __init__(
        self,
        path: str,
        question: str = "question",
        choices: str = "choices",
        answer: str = "answer",
        id: str | None = None,
        by: Sequence[str] = ("generation", "likelihood"),
        first: int = 0,
        max_questions: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        scored: str = "text",
        instruction: str = INSTRUCTION,
        system: str | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        """
        Args:
            answer: column of the right option: its index from 0, its letter, or its text.
            first, max_questions: rows [first, first + max_questions) of the file are asked.
            scored: what `by: likelihood` scores: `text`, each option's text as the answer to the bare question; or
                `letter`, each letter as the answer to the question with its list. End of turn included.

        Raises:
            ConfigError: an unknown `by` or `scored`; a row that cannot be used (names file, line and field).
            StorageError: the file cannot be read.
        """
        if isinstance(by, str):
            by = [by]
        for way in by:
            if way not in _BY:
                raise ConfigError(f"multiple_choice.by holds {way!r}, which is unknown{near(way, _BY)}")
        if not by:
            raise ConfigError(f"multiple_choice.by is empty{near('', _BY)}")
        if scored not in _SCORED:
            raise ConfigError(f"multiple_choice.scored is {scored!r}, which is unknown{near(scored, _SCORED)}")
        rows = read_rows(path, first, max_questions)
        names = [row.name(id) for row in rows]
        check_names(rows, names)
        self.questions = tuple(
            _question(row, name, question, choices, answer, seed if shuffle else None)
            for row, name in zip(rows, names, strict=True)
        )
        self.by = tuple(way for way in _BY if way in by)
        self.metrics = tuple(metric for way in self.by for metric in _METRICS[way])
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        self._scored = scored
        self._instruction = instruction
        self._system = (Message("system", system),) if system else ()

    def fingerprint(self) -> dict[str, Any]:
        """See Evaluator."""
        asked = [[q.id, q.text, q.choices, q.right, q.order] for q in self.questions]
        return {
            "questions": digest_of(asked),
            "count": len(asked),
            "by": list(self.by),
            "scored": self._scored,
            "instruction": self._instruction,
            "system": [m.content for m in self._system],
            "rules": 1,  # of the option parser: other rules, other items
        }

    def prompts(self) -> list[Prompt]:
        """See Evaluator."""
        if "generation" not in self.by:
            return []
        return [Prompt(q.id, self._turns(q.listed(self._instruction))) for q in self.questions]

    def candidates(self) -> list[Candidate]:
        """See Evaluator. Ids are `<question>/<index of the option>`."""
        if "likelihood" not in self.by:
            return []
        out = []
        for q in self.questions:
            turns = self._turns(q.text if self._scored == "text" else q.listed(self._instruction))
            for place, k in enumerate(q.order):
                response = q.choices[k] if self._scored == "text" else ascii_uppercase[place]
                out.append(Candidate(f"{q.id}/{k}", turns, response))
        return out

    def items(
        self, answers: Mapping[str, str], likelihoods: Mapping[str, Likelihood], judge: Judge | None
    ) -> list[Item]:
        """See Evaluator. An answer that cannot be read is wrong, and counted as `unparsed`. A question one of whose
        options has no likelihood has no value by likelihood; options of equal likelihood share it."""
        out = []
        for q in self.questions:
            values: dict[str, float | None] = {}
            detail: dict[str, Any] = {"question": q.text, "right": q.choices[q.right]}
            if "generation" in self.by:
                said = answers.get(q.id, "")
                found = parse_option(said, q.shown())
                chosen = None if found.index is None else q.order[found.index]
                values |= {"accuracy": float(chosen == q.right), "unparsed": float(chosen is None)}
                detail |= {"answer": said, "rule": found.rule, "chosen": None if chosen is None else q.choices[chosen]}
            if "likelihood" in self.by:
                of = [likelihoods.get(f"{q.id}/{k}") for k in range(len(q.choices))]
                there = [x for x in of if x is not None and x.tokens > 0]
                whole = len(there) == len(of)
                mean = [x.nats / x.tokens for x in there]
                values["accuracy_likelihood"] = _share_of_best(mean, q.right) if whole else None
                values["accuracy_likelihood_sum"] = _share_of_best([x.nats for x in there], q.right) if whole else None
                detail["nats_per_token"] = mean if whole else None
            out.append(Item(q.id, values, detail=detail))
        return out

    def _turns(self, text: str) -> tuple[Message, ...]:
        return (*self._system, Message("user", text))


def _share_of_best(values: Sequence[float], right: int) -> float:
    """1 where the right one is the best, 0 where it is not, its share where several are the best."""
    best = max(values)
    return float(values[right] == best) / sum(v == best for v in values)


def _question(row: Row, name: str, question: str, choices: str, answer: str, seed: int | None) -> Question:
    text, value, right = row.text(question), row.get(choices), row.get(answer)
    try:
        return make_question(name, text, value, right, seed, (choices, answer))
    except BadRow as e:
        raise ConfigError(f"{row.where}: {e.reason}") from None
