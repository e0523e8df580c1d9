"""JSON lines: one object a line; plain, gzip or zstd. Blank lines are no rows; a broken line is a row with an error.

Units of a plain file are byte ranges (`hint` is the offset of the first line). A compressed stream cannot be entered
in the middle: it is one unit, whose parts are cut as it streams.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from connectors import lines, storage
from connectors.base import Connector, Range, Row, changed, check_keep, check_ranges
from connectors.storage import FileInfo
from curate.corpus.units import FileEntry, Unit
from curate.errors import CorpusError

_COLUMN_ROWS = 100  # good rows that are looked at for column names


def parse(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """(value, None) or (None, why not). NaN and Infinity are read, as most writers of JSON lines write them."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        return None, f"not UTF-8 (byte {e.start} of the line)"
    except json.JSONDecodeError as e:
        return None, f"broken JSON: {e.msg} (character {e.pos})"
    except RecursionError:
        return None, "broken JSON: nested too deeply"
    except ValueError as e:  # a number of thousands of digits
        return None, f"broken JSON: {e}"
    if not isinstance(value, dict):
        return None, f"the line is a JSON {type(value).__name__}, not an object"
    return value, None


@dataclass
class _Cutter:
    """Cuts lines into units by rows and bytes; collects column names."""

    info: FileInfo
    rows: int
    size: int | None
    units: list[Unit] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    good: int = 0
    n: int = 0
    _first: int = 0
    _offset: int = 0

    def add(self, offset: int, line: bytes) -> None:
        full = self.size is not None and offset + len(line) - self._offset > self.size
        if self.n == self._first:
            self._offset = offset
        elif self.n - self._first >= self.rows or full:
            self.close()
            self._offset = offset
        self.n += 1
        if self.good < _COLUMN_ROWS:
            value, _ = parse(line)
            if value is not None:
                self.good += 1
                self.columns.update(dict.fromkeys(value))

    def close(self) -> None:
        if self.n > self._first:
            self.units.append(
                Unit(self.info.name, self.info.url, self._first, self.n, self.n - self._first, self._offset)
            )
            self._first = self.n


class Jsonl(Connector):
    name = "jsonl"
    extensions = tuple(f".{e}{c}" for e in ("jsonl", "ndjson") for c in ("", ".gz", ".zst"))

    def scan(self, info: FileInfo, unit_rows: int, unit_bytes: int | None = None) -> tuple[FileEntry, list[Unit]]:
        if info.size == 0 and info.name.endswith((".gz", ".zst")):
            raise CorpusError(f"{info.url} is cut off: it has no bytes at all. Copy the file again.")
        cutter = _Cutter(info, unit_rows, unit_bytes)
        hasher = hashlib.blake2b(digest_size=16)
        last = b""
        with lines.open_text(info.url, hasher=hasher) as (stream, kind):
            for offset, line in lines.lines(stream, info.url):
                if not cutter.n:
                    _refuse_array(line, info.url)
                cutter.add(offset, line)
                last = line
        cutter.close()
        if last and not last.endswith(b"\n"):
            _, error = parse(last)
            if error:
                raise CorpusError(
                    f"{info.url} is cut off in the middle: row {cutter.n - 1}, its last, has no line end and is "
                    f"{error}. Copy the file again; if only that row is bad, end it with a line end."
                )
        units = cutter.units
        if kind != "none" and units:
            units = [Unit(info.name, info.url, 0, cutter.n, min(unit_rows, cutter.n))]
        entry = FileEntry(
            info.name, info.url, info.size, info.stamp, hasher.hexdigest(), cutter.n, tuple(cutter.columns)
        )
        return entry, units

    def read(
        self, unit: Unit, columns: Sequence[str], ranges: Sequence[Range] | None = None
    ) -> Iterator[tuple[int, int, list[Row]]]:
        wanted = check_ranges(unit, ranges)
        if not wanted:
            return
        with lines.open_text(unit.url, unit.hint) as (stream, _):
            numbered = enumerate(lines.lines(stream, unit.url, unit.hint), unit.start)
            index = unit.start - 1
            for start, stop in wanted:
                rows: list[Row] = []
                for index, (_, line) in numbered:
                    if index >= start:
                        rows.append(_row(index, line, columns))
                    if index == stop - 1:
                        break
                if index != stop - 1:
                    raise changed(unit.url, unit.stop, f"only {index + 1} rows")
                yield start, stop, rows

    def curate(self, entry: FileEntry, target_url: str, keep: Bool[np.ndarray, " rows"]) -> int:
        check_keep(entry, keep)
        n = 0
        with (
            lines.open_text(entry.url) as (stream, kind),
            storage.atomic_writer(target_url) as raw,
            lines.compressed(raw, kind) as out,
        ):
            for offset, line in lines.raw_lines(stream, entry.url):
                if offset == 0 and line.startswith(lines.BOM):  # stays, whether the first row does or not
                    out.write(lines.BOM)
                    line = line[len(lines.BOM) :]
                if not line or line.isspace():
                    continue
                if n >= entry.rows:
                    raise changed(entry.url, entry.rows, "more rows")
                if keep[n]:
                    out.write(line)
                n += 1
            if n != entry.rows:
                raise changed(entry.url, entry.rows, f"{n} rows")
        return int(keep.sum())


def _row(index: int, line: bytes, columns: Sequence[str]) -> Row:
    value, error = parse(line)
    if value is None:
        return Row(index, None, error)
    return Row(index, {c: value[c] for c in columns if c in value})


def _refuse_array(first: bytes, url: str) -> None:
    if first.lstrip().startswith(b"["):
        raise CorpusError(
            f"{url} holds one JSON array, not JSON lines. Turn it into lines, for example with: jq -c '.[]'"
        )
