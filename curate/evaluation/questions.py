"""Question files: rows of JSON values that evaluators are made from.

In: the URL of a .jsonl (one object a line), .json or .yaml file (a list of objects). Out: Rows, which read their own
fields and say file, line and field when a field is not what it should be. Knows no evaluator and no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from connectors import storage
from connectors.packages import expand
from curate.errors import ConfigError, near


@dataclass(frozen=True)
class Row:
    """One object of a file. `number` counts rows from 0; `where` names file and line (or entry) for messages."""

    number: int
    where: str
    values: Mapping[str, Any]

    def get(self, column: str) -> Any:
        """The value of a column that must be there.

        Raises:
            ConfigError: there is no such column, or it holds null.
        """
        if self.values.get(column) is None:
            said = "holds null in" if column in self.values else "has no field"
            others = near(column, [c for c in map(str, self.values) if c != column])
            raise ConfigError(f"{self.where} {said} {column!r}{others}")
        return self.values[column]

    def text(self, column: str) -> str:
        """A text that is not blank, as it stands.

        Raises:
            ConfigError: missing, not a text, blank, or not valid Unicode.
        """
        return self._checked(self.get(column), repr(column))

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts, at least one, none of them blank; a single text is a list of one.

        Raises:
            ConfigError: as `text`, and for an empty list; names the entry.
        """
        value = self.get(column)
        if isinstance(value, str):
            return (self._checked(value, repr(column)),)
        if not isinstance(value, list):
            raise ConfigError(f"{self.where}: {column!r} is {_kind(value)}; expected a text or a list of texts")
        if not value:
            raise ConfigError(f"{self.where}: {column!r} is an empty list")
        return tuple(self._checked(v, f"{column!r}[{i}]") for i, v in enumerate(value))

    def name(self, column: str | None) -> str:
        """The row's id: a text or whole number of `column`; with `column=None` of a field `id`, else the row's number.

        Raises:
            ConfigError: a named column is missing, or holds something else.
        """
        if column is None and self.values.get("id") is None:
            return str(self.number)
        value = self.get(column or "id")
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise ConfigError(f"{self.where}: {column or 'id'!r} is {_kind(value)}; expected a text or a whole number")
        return str(value)

    def _checked(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: {what} is {_kind(value)}; expected a text")
        if not value.strip():
            raise ConfigError(f"{self.where}: {what} is an empty text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{self.where}: {what} holds text that is not valid Unicode") from None
        return value


def read_rows(url: str, first: int = 0, count: int | None = None) -> list[Row]:
    """Rows [first, first + count) of a question file, in order; all from `first` with `count=None`. Blank lines of a
    .jsonl file are no rows.

    Raises:
        StorageError: the file cannot be read. ConfigError: an unknown suffix, broken JSON or YAML, a row that is no
            object, no row in the range, or a range that makes no sense; names the line or entry.
    """
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ConfigError(f"first is {first!r}; expected the number of rows of {url} to skip, 0 or more")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"the number of rows to take from {url} is {count!r}; expected 1 or more, or null for all")
    stop = None if count is None else first + count
    rows, there = [], 0
    for number, (where, value) in enumerate(_entries(expand(url))):
        there += 1
        if number < first or (stop is not None and number >= stop):
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {_kind(value)}; expected an object with named fields")
        rows.append(Row(number, where, value))
    if not rows:
        said = "holds no rows" if not there else f"holds {there} rows, so none is left after skipping first={first}"
        raise ConfigError(f"{url} {said}")
    return rows


def check_names(rows: Sequence[Row], names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: two rows have one id; names both.
    """
    seen: dict[str, Row] = {}
    for row, name in zip(rows, names, strict=True):
        if name in seen:
            raise ConfigError(f"{row.where} has the id {name!r} of {seen[name].where}; ids must be unique")
        seen[name] = row


def digest_of(value: Any) -> str:
    """Hash of JSON values, for fingerprints: what the questions say, wherever their file lies."""
    payload = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(payload.encode(), digest_size=12).hexdigest()


def _entries(url: str) -> Iterator[tuple[str, Any]]:
    """(where, value) of every row."""
    suffix = url.split("?")[0].rpartition(".")[2].lower()
    if suffix not in ("jsonl", "json", "yaml", "yml"):
        raise ConfigError(f"question file {url}: unknown suffix {suffix!r}; expected .jsonl, .json, .yaml or .yml")
    content = storage.read_text(url)
    if suffix == "jsonl":
        # Not splitlines(): JSON texts may hold U+2028 and its like unescaped.
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                where = f"{url} line {number}"
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise ConfigError(f"{where} is not valid JSON: {e}") from e
        return
    try:
        values = json.loads(content) if suffix == "json" else yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        raise ConfigError(f"{url} cannot be parsed: {e}") from e
    if not isinstance(values, list):
        raise ConfigError(f"{url} holds {_kind(values)}; expected a list of objects")
    for number, value in enumerate(values):
        yield f"{url} entry {number}", value


def _kind(value: Any) -> str:
    """What a JSON value is, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, Mapping) else type(value).__name__
