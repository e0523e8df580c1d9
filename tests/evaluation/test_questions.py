"""Question files: what is read, and what is said of what cannot be."""

from __future__ import annotations

import json

import pytest

from curate.errors import ConfigError, StorageError
from curate.evaluation.questions import Row, check_names, digest_of, read_rows

ROWS = [{"id": "a", "text": "x\u2028y"}, {"id": 7, "text": "z"}, {"text": ["p", "q"]}]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n")
    else:
        path.write_text(json.dumps(rows))  # JSON is YAML too
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "yaml", "yml"])
def test_forms_of_a_file(tmp_path, suffix):
    rows = read_rows(write(tmp_path / f"q.{suffix}", ROWS))
    assert [r.values for r in rows] == ROWS
    assert [r.name(None) for r in rows] == ["a", "7", "2"]
    assert rows[2].texts("text") == ("p", "q")
    assert rows[0].texts("text") == ("x\u2028y",)


def test_a_range_of_rows(tmp_path):
    url = write(tmp_path / "q.jsonl", [{"n": i} for i in range(10)])
    found = read_rows(url, 3, 4)
    assert [(r.number, r.values["n"]) for r in found] == [(3, 3), (4, 4), (5, 5), (6, 6)]
    assert found[0].where.endswith("q.jsonl line 7")  # a blank line stands between rows
    assert [r.number for r in read_rows(url, 8, 100)] == [8, 9]
    with pytest.raises(ConfigError, match="holds 10 rows, so none is left after skipping first=10"):
        read_rows(url, 10)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.jsonl", '{"a": 1}\n{"a": \n', r"q\.jsonl line 2 is not valid JSON"),
        ("q.jsonl", '{"a": 1}\n[1]\n', r"q\.jsonl line 2 is a list; expected an object"),
        ("q.jsonl", "\n", "holds no rows"),
        ("q.json", '{"a": 1}', "holds an object; expected a list"),
        ("q.json", "[", "cannot be parsed"),
        ("q.json", "[null]", r"q\.json entry 0 is null"),
        ("q.yaml", "a: [", "cannot be parsed"),
        ("q.yaml", "!!python/object/apply:os.getcwd []", "cannot be parsed"),
        ("q.csv", "a,b", "unknown suffix 'csv'"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_rows(str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="nowhere"):
        read_rows(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(("first", "count"), [(-1, None), (True, None), (0, 0), (0, "all"), (1.5, None)])
def test_ranges_that_make_no_sense(tmp_path, first, count):
    with pytest.raises(ConfigError, match=r"first is|number of rows"):
        read_rows(write(tmp_path / "q.jsonl", ROWS), first, count)


@pytest.mark.parametrize(
    ("values", "ask", "said"),
    [
        ({"prompt": 1}, lambda r: r.text("promt"), "f line 3 has no field 'promt'; did you mean 'prompt'"),
        ({"a": None}, lambda r: r.text("a"), "f line 3 holds null in 'a'"),
        ({"a": 3}, lambda r: r.text("a"), "f line 3: 'a' is 3; expected a text"),
        ({"a": " "}, lambda r: r.text("a"), "f line 3: 'a' is an empty text"),
        ({"a": "\ud800"}, lambda r: r.text("a"), "f line 3: 'a' holds text that is not valid Unicode"),
        ({"a": []}, lambda r: r.texts("a"), "f line 3: 'a' is an empty list"),
        ({"a": {}}, lambda r: r.texts("a"), "f line 3: 'a' is an object; expected a text or a list"),
        ({"a": ["x", 1]}, lambda r: r.texts("a"), r"f line 3: 'a'\[1\] is 1; expected a text"),
        ({"id": True}, lambda r: r.name(None), "f line 3: 'id' is True"),
        ({"id": ["x"]}, lambda r: r.name("id"), "f line 3: 'id' is a list"),
        ({"a": 1}, lambda r: r.name("key"), "f line 3 has no field 'key'"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(values, ask, said):
    with pytest.raises(ConfigError, match=said):
        ask(Row(2, "f line 3", values))


def test_ids_are_unique():
    rows = [Row(i, f"f line {i + 1}", {"id": x}) for i, x in enumerate(["a", "b", "a"])]
    with pytest.raises(ConfigError, match="f line 3 has the id 'a' of f line 1"):
        check_names(rows, [r.name(None) for r in rows])


def test_digests_follow_the_content():
    assert digest_of([1, {"a": "x", "b": 2}]) == digest_of([1, {"b": 2, "a": "x"}])
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
