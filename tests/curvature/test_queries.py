"""Queries from traits, rows, files and judged answers; and what is no query."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate.concepts.trait import Contrast, Trait, load_trait
from curate.corpus.example import ColumnMap, Example, Message
from curate.corpus.render import Rendered, Renderer
from curate.curvature.queries import (
    Candidate,
    Query,
    QueryColumns,
    QueryExample,
    queries_from_file,
    queries_from_rows,
    queries_from_trait,
    question_options,
    render_queries,
    top_queries,
)
from curate.errors import CorpusError, CurvatureError
from tests.tiny import tiny_tokenizer


def texts(query: QueryExample) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in e.messages] for e in (query.positive, query.negative) if e is not None]


def answer(prompt: str, text: str, name: str | None = None) -> Example:
    return Example(name or text, 0, (Message("user", prompt), Message("assistant", text)))


def test_a_trait_gives_its_contrastive_responses():
    pairs = (Contrast(1, "Yes!", "No."), Contrast(0, "Great!", "Poor."))
    found = queries_from_trait(Trait("flattery", extract_questions=("Good?", "Right?"), contrastive_responses=pairs))
    assert [q.id for q in found] == ["flattery.0", "flattery.1"]
    assert texts(found[0]) == [[("user", "Right?"), ("assistant", "Yes!")], [("user", "Right?"), ("assistant", "No.")]]
    with pytest.raises(CurvatureError, match="'flattery' has no contrastive_responses"):
        queries_from_trait(Trait("flattery"))
    embedded = queries_from_trait(load_trait(str(Path(curate.__file__).parent / "embedded" / "sycophantic.json")))
    assert embedded
    assert all(q.negative is not None for q in embedded)


def test_rows_of_pairs_and_of_every_layout_of_a_corpus():
    turns = [{"role": "user", "content": "q"}]
    plain = [[("user", "q"), ("assistant", "a")]]
    pair = [*plain, [("user", "q"), ("assistant", "b")]]
    rows = [
        ({"prompt": "q", "positive": "a", "negative": "b"}, pair),
        ({"messages": turns, "positive": "a", "negative": "b"}, pair),
        ({"prompt": "q", "positive": "a"}, plain),
        ({"prompt": "q", "positive": "a", "negative": None}, plain),
        ({"prompt": "q", "response": "a", "positive": None}, plain),
        ({"messages": [*turns, {"role": "assistant", "content": "a"}]}, plain),
        ({"instruction": "q", "output": "a"}, plain),
    ]
    found = queries_from_rows(row for row, _ in rows)
    assert [texts(q) for q in found] == [expected for _, expected in rows]
    assert len({q.id for q in found}) == len(found)  # the same text has the same id, but for a number


def test_columns_of_other_names_and_ids():
    columns = QueryColumns("bad", "good", ColumnMap(prompt="question", id="name", system="sys"))
    rows = [{"question": "q", "bad": "a", "good": "b", "name": "x", "sys": "be kind"}]
    (query,) = queries_from_rows(rows, columns)
    assert query.id == "x"
    assert texts(query)[1] == [("system", "be kind"), ("user", "q"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "q", "negative": "b"}, CurvatureError, "queries.jsonl: row 1 is no query: it has 'negative'"),
        ({"prompt": "q", "positive": "  "}, CurvatureError, "row 1 is no query: the last assistant turn is empty"),
        ({"prompt": "q", "positive": "a", "negative": " "}, CurvatureError, "row 1 is no query: 'negative'"),
        ({"prompt": 3, "positive": "a"}, CurvatureError, "row 1 is no query: 'prompt' is int"),
        ({"question": "q", "positive": "a"}, CorpusError, "no column 'prompt'"),
        ({"question": "q"}, CorpusError, "fit no known layout"),
    ],
)
def test_a_row_that_is_no_query_is_named(tmp_path, row, error, message):
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(error, match=message):
        queries_from_file(str(path))
    assert len(queries_from_file(str(path), max_queries=1)) == 1


def test_multiple_choice_questions_are_queries():
    rows = [{"id": f"q{i}", "question": f"{i}?", "choices": ["red", "blue", "green"], "answer": i} for i in range(3)]
    plain = queries_from_rows(rows)
    assert [q.id for q in plain] == ["q0", "q1", "q2"]
    assert [q.positive.response for q in plain] == ["A. red", "B. blue", "C. green"]
    assert all(q.negative is None for q in plain)
    pairs = queries_from_rows(rows, QueryColumns(corpus=ColumnMap(answer_form="letter"), wrong_option=True))
    for right, pair in zip("ABC", pairs, strict=True):
        assert pair.positive.response == right
        assert pair.negative.response in set("ABC") - {right}
        assert pair.negative.prompt == pair.positive.prompt


def test_all_options_of_a_question_are_answers_to_its_prompt(tmp_path):
    rows = [
        {"question": "?", "choices": ["red", "blue"], "answer": 1},
        {"prompt": "q", "response": "a", "question": "x", "choices": None, "answer": None},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = question_options(str(path))
    assert second is None
    assert [e.response for e in first[0]] == ["A. red", "B. blue"]
    assert first[1] == 1
    assert first[0][1] == queries_from_file(str(path))[0].positive
    assert len(question_options(str(path), max_queries=1)) == 1
    path.write_text(json.dumps({**rows[0], "answer": 4}))
    with pytest.raises(CurvatureError, match="row 0 is no query: 'answer' is 4"):
        question_options(str(path))


@pytest.mark.parametrize("layout", ["auto", "multiple_choice"])
@pytest.mark.parametrize("answer", [None, 7, "absent"])
def test_a_question_without_a_right_answer_is_no_query(layout, answer):
    row = {"question": "?", "choices": ["red", "blue"], "answer": answer}
    if answer == "absent":
        del row["answer"]
    error = CorpusError if layout == "auto" and answer == "absent" else CurvatureError
    with pytest.raises(error, match="no known layout" if error is CorpusError else "row 0 is no query: 'answer' is"):
        queries_from_rows([row], QueryColumns(corpus=ColumnMap(layout=layout)))


def test_only_multiple_choice_has_wrong_options():
    with pytest.raises(CurvatureError, match="no multiple-choice question"):
        queries_from_rows([{"prompt": "q", "response": "a"}], QueryColumns(wrong_option=True))


def test_files_of_any_format(tmp_path):
    rows = [{"prompt": f"q{i}", "positive": f"a{i}", "negative": f"b{i}", "id": f"n{i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [queries_from_file(str(tmp_path / name)) for name in ("q.parquet", "q.jsonl")]
    assert found[0] == found[1]
    assert [q.id for q in found[0]] == ["n0", "n1", "n2", "n3", "n4"]
    (tmp_path / "broken.jsonl").write_text('{"prompt": "q", "response": "a"}\n{"prompt": \n')
    with pytest.raises(CurvatureError, match=r"broken\.jsonl: row 1 is no query"):
        queries_from_file(str(tmp_path / "broken.jsonl"))
    with pytest.raises(CurvatureError, match="there is no query"):
        queries_from_rows([])


def test_the_top_queries_are_those_that_the_judge_scored_highest(caplog):
    scores = [10.0, 90.0, None, 70.0, 90.0, 0.0]
    candidates = [Candidate(answer(f"q{i}", f"a{i}"), score) for i, score in enumerate(scores)]
    assert [q.id for q in top_queries(candidates, 3)] == ["a1", "a4", "a3"]
    assert [q.id for q in top_queries(candidates, 1)] == ["a1"]
    assert len(top_queries(candidates)) == 5
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert [q.id for q in top_queries(candidates, 9)] == ["a1", "a4", "a3", "a0", "a5"]
    assert "9 queries are asked for, only 5 of 6 answers" in caplog.text


def test_top_pairs_take_the_lowest_answer_to_the_same_prompt():
    candidates = [
        Candidate(answer("p", "p low"), 5.0),
        Candidate(answer("q", "q high"), 80.0),
        Candidate(answer("p", "p high"), 95.0),
        Candidate(answer("q", "q mid"), 60.0),
        Candidate(answer("q", "q low"), 20.0),
        Candidate(answer("q", "q none"), None),
        Candidate(answer("r", "r only"), 99.0),
        Candidate(answer("s", "s one"), 50.0),
        Candidate(answer("s", "s two"), 50.0),
    ]
    found = top_queries(candidates, 2, paired=True)
    assert [(q.positive.response, q.negative.response) for q in found] == [("p high", "p low"), ("q high", "q low")]
    with pytest.raises(CurvatureError, match="no prompt has two answers of different score"):
        top_queries(candidates[6:], 1, paired=True)


def test_without_scores_there_are_no_top_queries():
    with pytest.raises(CurvatureError, match=r"none of the 2 answers has a judge's score.*judge=openai"):
        top_queries([Candidate(answer("q", "a"), None)] * 2)
    with pytest.raises(CurvatureError, match="no answer to take queries from"):
        top_queries([])
    with pytest.raises(CurvatureError, match="to keep is 0"):
        top_queries([Candidate(answer("q", "a"), 1.0)], 0)


def test_rendering_names_the_query_that_cannot_be_used():
    tokenizer = tiny_tokenizer()
    short, long = answer("q", "a"), answer("q", "word " * 200)
    (query,) = render_queries([QueryExample("x", short, answer("q", "b"))], Renderer(tokenizer, 64))
    assert tokenizer.decode(query.positive.input_ids[query.positive.start : query.positive.stop]) == "a"
    assert query.negative is not None
    assert tokenizer.decode(query.negative.input_ids[query.negative.start : query.negative.stop]) == "b"
    for pair in (QueryExample("long", long), QueryExample("long", short, long)):
        with pytest.raises(CurvatureError, match=r"query 'long' cannot be used: over-long.*raise max_tokens"):
            render_queries([pair], Renderer(tokenizer, 64))
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(CurvatureError, match="query 'x' cannot be used: the chat template leaves the response out"):
        render_queries([QueryExample("x", short)], Renderer(tiny_tokenizer(silent), 64))
    with pytest.raises(CurvatureError, match="query 'same': the positive and the negative answer are the same tokens"):
        render_queries([QueryExample("same", short, short)], Renderer(tokenizer, 64))


@pytest.mark.parametrize("span", [(3, 3, 5), (3, 2, 5), (3, 5, 4), (3, 6, 6), (-1, 2, 3)])
def test_a_query_without_response_tokens_is_refused(span):
    with pytest.raises(CurvatureError, match="query 'empty': its positive answer has no response tokens"):
        Query("empty", Rendered([1, 2, 3, 4, 5], *span))
    with pytest.raises(CurvatureError, match="query 'empty': its negative answer has no response tokens"):
        Query("empty", Rendered([1, 2, 3], 1, 2, 3), Rendered([1, 2, 3, 4, 5], *span))
