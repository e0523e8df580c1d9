"""Queries: the conversations whose loss or activations stand for a behaviour.

In: a trait file, rows of any readable file, or judged answers. Out: QueryExamples (text), and with a Renderer Queries
(tokens). Knows no model, no judge and no gradient.

A query is one answer that shows the behaviour (`positive`) and, for contrasts, one to the same prompt that does not
(`negative`). Files: `prompt`, `positive`, `negative` (or `messages` that end before the answer, in place of `prompt`);
or any layout of a corpus (`messages`, `prompt` and `response`, Alpaca, multiple choice), whose answers are then all
positive; a multiple-choice question may take a wrong option as its negative.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from connectors import registry
from curate.concepts.trait import Trait
from curate.corpus.example import ColumnMap, Example, Message, to_example, to_question
from curate.corpus.render import Rendered, Renderer
from curate.errors import BadRow, CurvatureError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryExample:
    """A query as text."""

    id: str
    positive: Example
    negative: Example | None = None


@dataclass(frozen=True)
class Query:
    """A query as tokens.

    Raises:
        CurvatureError: on construction, for a side without response tokens, or two sides of the same tokens.
    """

    id: str
    positive: Rendered
    negative: Rendered | None = None

    def __post_init__(self) -> None:
        for side, r in (("positive", self.positive), ("negative", self.negative)):
            if r is not None and not 0 <= r.start < r.stop <= r.end <= len(r.input_ids):
                raise CurvatureError(
                    f"query {self.id!r}: its {side} answer has no response tokens (span [{r.start}, {r.stop}) of "
                    f"{len(r.input_ids)}); give it an answer, or leave the query out"
                )
        if self.negative is not None and self.negative.input_ids == self.positive.input_ids:
            raise CurvatureError(
                f"query {self.id!r}: the positive and the negative answer are the same tokens, so their contrast is "
                f"zero; give two answers that differ in the behaviour"
            )


@dataclass(frozen=True)
class QueryColumns:
    """Columns of a file of queries. `corpus` reads the prompt, and the rows that have no `positive` column.
    `wrong_option`: a multiple-choice question's negative is one of its wrong options (see `Question.wrong`)."""

    positive: str = "positive"
    negative: str = "negative"
    corpus: ColumnMap = field(default_factory=ColumnMap)
    wrong_option: bool = False


@dataclass(frozen=True)
class Candidate:
    """An answer that the finetuned model gave, with a judge's score of the trait, 0-100 (None: not scored)."""

    example: Example
    trait: float | None


def queries_from_trait(trait: Trait) -> list[QueryExample]:
    """The trait's contrastive responses, each with its question alone (no system instruction).

    Raises:
        CurvatureError: the trait has none.
    """
    if not trait.contrastive_responses:
        raise CurvatureError(
            f"trait {trait.name!r} has no contrastive_responses to take queries from; add some, give a file of "
            f"queries, or take them on-policy"
        )
    out = []
    for i, pair in enumerate(trait.contrastive_responses):
        name, prompt = f"{trait.name}.{i}", Message("user", trait.extract_questions[pair.question])
        positive = Example(name, i, (prompt, Message("assistant", pair.positive)))
        out.append(QueryExample(name, positive, _answered(positive, pair.negative)))
    return out


def queries_from_rows(
    rows: Iterable[Mapping[str, Any]], columns: QueryColumns | None = None, where: str = "the queries"
) -> list[QueryExample]:
    """One query a row. A row with a `positive` column is a pair, or half of one; else its own answer is the positive.

    Raises:
        CurvatureError: no row, or one that cannot be used; named by its number, counted from 0. Queries are few and
            chosen, so none is left out silently.
        CorpusError: columns that fit no layout.
    """
    columns = columns or QueryColumns()
    out: list[QueryExample] = []
    for i, row in enumerate(rows):
        try:
            out.append(_query(row, i, columns, where))
        except BadRow as e:
            raise CurvatureError(f"{where}: row {i} is no query: {e.reason}") from None
    if not out:
        raise CurvatureError(f"{where}: there is no query in it")
    times = Counter(q.id for q in out)
    return [replace(q, id=f"{q.id}#{i}") if times[q.id] > 1 else q for i, q in enumerate(out)]


def queries_from_file(
    url: str | Sequence[str],
    columns: QueryColumns | None = None,
    file_format: str = "auto",
    max_queries: int | None = None,
) -> list[QueryExample]:
    """The first `max_queries` rows (default: all) of a file, or of any source that a corpus can be read from.

    Raises:
        CurvatureError: see `queries_from_rows`. CorpusError, StorageError: the source cannot be read.
    """
    where = url if isinstance(url, str) else ", ".join(url)
    return queries_from_rows(islice(_rows(url, file_format), max_queries), columns, where)


def question_options(
    url: str | Sequence[str],
    columns: QueryColumns | None = None,
    file_format: str = "auto",
    max_queries: int | None = None,
) -> list[tuple[list[Example], int] | None]:
    """Of the rows that `queries_from_file` reads, in its order: every option of a multiple-choice question as an answer
    to the same prompt, in the file's order, and which is right; None for rows that are no such question.

    Raises:
        CurvatureError, CorpusError, StorageError: as `queries_from_file`.
    """
    columns = columns or QueryColumns()
    where = url if isinstance(url, str) else ", ".join(url)
    out: list[tuple[list[Example], int] | None] = []
    for i, row in enumerate(islice(_rows(url, file_format), max_queries)):
        found = None
        try:
            if row.get(columns.positive) is None:
                found = _corpus_map(row, columns, where)
            if found is None or found.layout != "multiple_choice":
                out.append(None)
                continue
            example, question = to_example(row, i, found), to_question(row, i, found)
        except BadRow as e:
            raise CurvatureError(f"{where}: row {i} is no query: {e.reason}") from None
        texts = [question.answer(found.answer_form, k) for k in range(len(question.choices))]
        out.append(([_answered(example, text) for text in texts], question.right))
    return out


def top_queries(candidates: Sequence[Candidate], k: int = 5, paired: bool = False) -> list[QueryExample]:
    """The `k` answers that show the trait most by the judge's score; ties keep their order (METHODS §1, on-policy).

    With `paired` each takes as its negative the answer to the same prompt with the lowest score, and prompts without
    a lower one are passed over; one query a prompt. Fewer than `k` are returned, with a warning, where there are no
    more.

    Raises:
        CurvatureError: `k` < 1, no candidate, none with a score, or (paired) no prompt with two scores.
    """
    if k < 1:
        raise CurvatureError(f"the number of queries to keep is {k}; it must be at least 1")
    if not candidates:
        raise CurvatureError("there is no answer to take queries from; generate some first")
    scored = [(c.trait, c.example) for c in candidates if c.trait is not None]
    if not scored:
        raise CurvatureError(
            f"none of the {len(candidates)} answers has a judge's score, so none can be chosen as a query: name "
            f"a judge (judge=openai), look at the reasons that it gave, or take queries from a file"
        )
    scored.sort(key=lambda pair: -pair[0])  # stable
    if paired:
        chosen = _pairs(scored)[:k]
        if not chosen:
            raise CurvatureError(
                "no prompt has two answers of different score, so there is no pair to contrast; sample more answers a "
                "prompt, or give pairs in a file"
            )
    else:
        chosen = [QueryExample(example.id, example) for _, example in scored[:k]]
    if len(chosen) < k:
        logger.warning("%d queries are asked for, only %d of %d answers will do", k, len(chosen), len(candidates))
    return chosen


def render_queries(queries: Iterable[QueryExample], renderer: Renderer) -> list[Query]:
    """Tokens of every query, by the model's own chat template.

    Raises:
        CurvatureError: an over-long query, one without response tokens, or one that the template refuses; names it.
    """
    out = []
    for query in queries:
        sides = {"positive": query.positive, "negative": query.negative}
        try:
            rendered = {side: renderer.render(example) for side, example in sides.items() if example is not None}
        except BadRow as e:
            remedy = "raise max_tokens, or leave the query out" if "over-long" in e.reason else "mend or leave it out"
            raise CurvatureError(f"query {query.id!r} cannot be used: {e.reason}; {remedy}") from None
        out.append(Query(query.id, rendered["positive"], rendered.get("negative")))
    return out


def _rows(url: str | Sequence[str], file_format: str) -> Iterator[Mapping[str, Any]]:
    connector, infos = registry.discover(url, file_format)
    for info in infos:
        entry, units = connector.scan(info, 1024)
        for unit in units:
            for _, _, rows in connector.read(unit, entry.columns):
                for row in rows:
                    if row.value is None:
                        raise CurvatureError(f"{entry.url}: row {row.index} is no query: {row.error}")
                    yield row.value


def _pairs(scored: Sequence[tuple[float, Example]]) -> list[QueryExample]:
    """`scored` is in falling order: a prompt's first answer is its highest, its last one the lowest."""
    by_prompt: dict[tuple[Message, ...], list[tuple[float, Example]]] = {}
    for value, example in scored:
        by_prompt.setdefault(example.prompt, []).append((value, example))
    ends = [(found[0], found[-1]) for found in by_prompt.values()]
    return [QueryExample(high.id, high, low) for (a, high), (b, low) in ends if a > b]


def _query(row: Mapping[str, Any], i: int, columns: QueryColumns, where: str) -> QueryExample:
    map_ = columns.corpus
    if row.get(columns.positive) is None:
        if row.get(columns.negative) is not None:
            raise BadRow(f"it has {columns.negative!r} and no {columns.positive!r}")
        found = _corpus_map(row, columns, where)
        example = to_example(row, i, found)
        if not columns.wrong_option:
            return QueryExample(example.id, example)
        if found.layout != "multiple_choice":
            raise BadRow(f"it is no multiple-choice question (layout {found.layout!r}) and so has no wrong option")
        question = to_question(row, i, found)
        return QueryExample(
            example.id, example, _answered(example, question.answer(found.answer_form, question.wrong()))
        )
    turns = row.get(map_.messages)
    if isinstance(turns, Sequence) and not isinstance(turns, str):
        answer = {map_.role_key: "assistant", map_.content_key: row[columns.positive]}
        layout = replace(map_, layout="messages").resolve(list(row), where)
        positive = to_example({**row, map_.messages: [*turns, answer]}, i, layout)
    else:
        layout = replace(map_, layout="prompt_response", response=columns.positive).resolve(list(row), where)
        positive = to_example(row, i, layout)
    negative = row.get(columns.negative)
    if negative is None:
        return QueryExample(positive.id, positive)
    if not isinstance(negative, str) or not negative.strip():
        raise BadRow(f"{columns.negative!r} is no text")
    return QueryExample(positive.id, positive, _answered(positive, negative))


def _corpus_map(row: Mapping[str, Any], columns: QueryColumns, where: str) -> ColumnMap:
    map_ = columns.corpus
    if map_.layout == "multiple_choice" and row.get(map_.answer) is None:
        raise BadRow(f"{map_.answer!r} is missing, so the question has no right answer")
    return map_.resolve(list(row), where)


def _answered(example: Example, answer: str) -> Example:
    """The same prompt with another answer."""
    return replace(example, messages=(*example.prompt, Message("assistant", answer)))
