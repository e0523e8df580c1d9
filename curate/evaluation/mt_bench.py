"""Two-turn questions: how good a model's answers are over two turns, as a judge sees it (after MT-Bench).

In: a file of questions with `turns` (the second builds on the answer to the first), a `category`, and for some
a reference answer a turn. Out: every answer rated 1-10. Knows no endpoint: the judge is given.

The judge's question is our own: it gives a number 0-100 as every judge does here (METHODS §4), which is mapped to
MT-Bench's scale by 1 + 9·n/100. Ratings by another judge with another question are not comparable with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from curate.corpus.example import Message, Prompt
from curate.errors import ConfigError, near
from curate.evaluation.base import Evaluator, Item, Likelihood, Metric, Sampling
from curate.evaluation.judge import Judge, JudgeScore, NoJudge, reads_template
from curate.evaluation.questions import Row, check_names, digest_of, read_rows

TEMPLATE = """You are marking the work of an assistant. Below is what it was asked and what it replied. Where a model \
answer is given, take it as correct; a reply may be worded otherwise and still be as good. Where an earlier exchange \
is given, it is there to be understood, and only the reply at the end is marked.

Mark how well the reply does what was asked: whether it is right, does all that was asked and keeps to what was laid \
down, and is useful and clear. Length alone earns nothing.

  0  empty, or nothing to do with the request
 25  tries, but mostly wrong or missing the point
 50  half of what was asked, or with a serious error
 75  good, with small errors or omissions
100  right, complete and clear: nothing of note to mend

<request>
{question}
</request>

<reply>
{answer}
</reply>

Your mark, as a whole number from 0 to 100. Write the number and nothing else."""


@dataclass(frozen=True)
class Question:
    """`turns`: what is asked, two of them. `reference`: right answers, one a turn, or none at all."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] = ()


class MTBench(Evaluator):
    """Judged answers to two-turn questions; see the module's docstring."""

    name: ClassVar[str] = "mt_bench"
    judged = True

    def __init__(
        self,
        path: str,
        references: str | None = None,
        categories: Sequence[str] | None = None,
        first: int = 0,
        max_questions: int | None = None,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            path: rows of `question_id` (or `id`), `category`, `turns` [2] and maybe `reference` [2].
            references: a file of rows `question_id`, `choices` [{turns [2]}] whose answers go before a `reference`.
            categories: only these; None = all. `first` and `max_questions` count rows of the file before that.

        Raises:
            ConfigError: a row that cannot be used (names file, line and field), or a category without
                questions. StorageError: a file cannot be read.
        """
        rows = read_rows(path, first, max_questions)
        names = [_name(row) for row in rows]
        check_names(rows, names)
        right = _references(references) if references else {}
        read = [_question(row, name, right) for row, name in zip(rows, names, strict=True)]
        there = {q.category for q in read}
        for category in categories or ():
            if category not in there:
                raise ConfigError(
                    f"mt_bench.categories holds {category!r}, of which {path} has none{near(category, there)}"
                )
        self.questions = tuple(q for q in read if categories is None or q.category in categories)
        if not self.questions:
            raise ConfigError("mt_bench.categories is empty; leave it out (null) to ask all questions")
        self._columns = {c: f"category_{_slug(c)}" for c in sorted({q.category for q in self.questions})}
        if len(set(self._columns.values())) < len(self._columns):
            raise ConfigError(f"{path} has categories that differ in punctuation alone: {sorted(self._columns)}")
        self.metrics = (
            Metric("score", "Rating", "capability", 1.0, 10.0),
            Metric("turn_1", "Rating of first answers", "capability", 1.0, 10.0),
            Metric("turn_2", "Rating of second answers", "capability", 1.0, 10.0),
            *(Metric(column, f"Rating: {c}", "capability", 1.0, 10.0) for c, column in self._columns.items()),
            Metric("empty", "Empty answers", "count", 0.0, 1.0),
            Metric("refused", "Answers that the judge calls refusals", "count", 0.0, 1.0),
            Metric("unparsable", "Answers to which the judge gave no number", "count", 0.0, 1.0),
        )
        self.sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        self._system = (Message("system", system),) if system else ()

    def fingerprint(self) -> dict[str, Any]:
        """See Evaluator."""
        asked = [[q.id, q.category, q.turns, q.reference] for q in self.questions]
        return {
            "questions": digest_of(asked),
            "count": len(asked),
            "system": [m.content for m in self._system],
            "template": digest_of(TEMPLATE),
        }

    def prompts(self) -> list[Prompt]:
        """See Evaluator. The first turns, as `<question>/1`."""
        return [Prompt(f"{q.id}/1", (*self._system, Message("user", q.turns[0]))) for q in self.questions]

    def follow_ups(self, answers: Mapping[str, str]) -> list[Prompt]:
        """See Evaluator. The second turns, as `<question>/2`; none after an empty first answer, on which there is
        nothing to build."""
        out = []
        for q in self.questions:
            said = answers.get(f"{q.id}/1", "")
            if said.strip():
                turns = (Message("user", q.turns[0]), Message("assistant", said), Message("user", q.turns[1]))
                out.append(Prompt(f"{q.id}/2", (*self._system, *turns)))
        return out

    def check(self, judge: Judge | None) -> None:
        """See Evaluator.

        Raises:
            ConfigError: there is no judge, or one that cannot be asked this.
        """
        if judge is None or isinstance(judge, NoJudge):
            raise ConfigError(
                "the evaluator 'mt_bench' needs a judge; choose one, for example judge=openai judge.model=…"
            )
        if not reads_template(judge):
            raise ConfigError(
                "the evaluator 'mt_bench' needs a judge that can be asked any question (judge=openai or vllm)"
            )

    def items(
        self, answers: Mapping[str, str], likelihoods: Mapping[str, Likelihood], judge: Judge | None
    ) -> list[Item]:
        """See Evaluator. One Item a turn; the turns of a question are resampled together. An empty answer has the
        lowest rating, unasked.

        Raises:
            ConfigError: see `check`.
        """
        self.check(judge)
        assert judge is not None
        turns = [(q, turn, answers.get(f"{q.id}/{turn}", "")) for q in self.questions for turn in (1, 2)]
        said = [(q, turn, answer) for q, turn, answer in turns if answer.strip()]
        pairs = [(judged_question(q, turn, answers.get(f"{q.id}/1", "")), answer) for q, turn, answer in said]
        scores = judge.score(pairs, TEMPLATE) if pairs else []
        found = {(q.id, turn): score for (q, turn, _), score in zip(said, scores, strict=True)}
        return [self._item(q, turn, answer, found.get((q.id, turn))) for q, turn, answer in turns]

    def _item(self, q: Question, turn: int, answer: str, score: JudgeScore | None) -> Item:
        number = 0.0 if score is None else score.value
        rating = None if number is None else 1.0 + 9.0 * number / 100.0
        refused = score is not None and score.refused
        values = {
            "score": rating,
            f"turn_{turn}": rating,
            self._columns[q.category]: rating,
            "empty": float(score is None),
            "refused": float(refused),
            "unparsable": float(rating is None and not refused),
        }
        detail: dict[str, Any] = {"category": q.category, "question": q.turns[turn - 1], "answer": answer}
        if score is None or score.reason:
            detail["reason"] = "the answer is empty" if score is None else score.reason
        return Item(f"{q.id}/{turn}", values, q.id, detail)


def judged_question(q: Question, turn: int, first_answer: str) -> str:
    """What the judge is told was asked: the request, before it the earlier exchange and after it the right answer."""
    parts = []
    if turn == 2:
        parts += [f"Earlier request:\n{q.turns[0]}", f"Earlier reply:\n{first_answer}"]
    parts.append(f"Request to be marked:\n{q.turns[turn - 1]}" if parts else q.turns[0])
    if turn <= len(q.reference) and q.reference[turn - 1].strip():
        parts.append(f"Model answer:\n{q.reference[turn - 1]}")
    return "\n\n".join(parts)


def _name(row: Row) -> str:
    return row.name("question_id" if "question_id" in row.values else "id" if "id" in row.values else None)


def _slug(category: str) -> str:
    return re.sub(r"\W+", "_", category.strip().lower()).strip("_")


def _question(row: Row, name: str, references: Mapping[str, tuple[str, ...]]) -> Question:
    turns = row.texts("turns")
    if len(turns) != 2:
        raise ConfigError(f"{row.where}: 'turns' holds {len(turns)} texts; expected two")
    category = row.text("category")
    if not _slug(category):
        raise ConfigError(f"{row.where}: 'category' is {category!r}; expected a word")
    own = row.values.get("reference")
    if own is not None and not (isinstance(own, list) and all(isinstance(x, str) for x in own)):
        raise ConfigError(f"{row.where}: 'reference' must be a list of texts, one a turn")
    return Question(name, category, (turns[0], turns[1]), references.get(name, tuple(own or ())))


def _references(url: str) -> dict[str, tuple[str, ...]]:
    rows = read_rows(url)
    names = [_name(row) for row in rows]
    check_names(rows, names)
    out = {}
    for row, name in zip(rows, names, strict=True):
        choices = row.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            raise ConfigError(f"{row.where}: 'choices' must be a list with an object that holds 'turns'")
        out[name] = Row(row.number, f"{row.where}: 'choices'[0]", choices[0]).texts("turns")
    return out
