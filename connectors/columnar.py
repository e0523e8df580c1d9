"""What Parquet and Arrow have in common: batches to rows, batches to ranges, and failures in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from connectors.base import Range, Row, changed
from curate.corpus.units import FileEntry, Unit
from curate.errors import CorpusError

BATCH_BYTES = 16 << 20  # decoded at a time, about


@contextmanager
def readable(url: str, what: str) -> Iterator[None]:
    """Within this block Arrow's complaints become CorpusErrors; the storage's own StorageErrors pass.

    `what` names the format: "Parquet".
    """
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as e:
        reason = " ".join(str(e).split())[:300].rstrip(".")
        raise CorpusError(f"{url} is cut off or broken, or no {what} file: {reason}. Copy the file again.") from e


def to_rows(batch: pa.RecordBatch, first: int, columns: Sequence[str]) -> list[Row]:
    """Rows of a batch whose first row has index `first`. A value that Python cannot hold spoils its own row only."""
    have = [c for c in columns if c in batch.schema.names]
    try:
        values = [batch.column(c).to_pylist() for c in have]
    except (ValueError, pa.ArrowException):  # text that is not UTF-8, a time out of range: find the row
        return [_row(batch, i, first + i, have) for i in range(batch.num_rows)]
    if not have:
        return [Row(first + i, {}) for i in range(batch.num_rows)]
    return [Row(first + i, dict(zip(have, v, strict=True))) for i, v in enumerate(zip(*values, strict=True))]


def _row(batch: pa.RecordBatch, i: int, index: int, columns: list[str]) -> Row:
    value: dict[str, Any] = {}
    for c in columns:
        try:
            value[c] = batch.column(c)[i].as_py()
        except (ValueError, pa.ArrowException) as e:
            return Row(index, None, f"column {c!r} cannot be read: {e}")
    return Row(index, value)


def to_ranges(
    batches: Iterable[pa.RecordBatch], at: int, unit: Unit, wanted: Sequence[Range], columns: Sequence[str]
) -> Iterator[tuple[int, int, list[Row]]]:
    """Cut a run of batches, the first of which begins at row `at`, into the wanted ranges.

    Raises:
        CorpusError: the batches end before the ranges do.
    """
    todo = iter(wanted)
    current = next(todo, None)
    rows: list[Row] = []
    for batch in batches:
        begin, end = at, at + batch.num_rows
        at = end
        while current and current[0] < end:
            start, stop = current
            a, b = max(start, begin), min(stop, end)
            rows += to_rows(batch.slice(a - begin, b - a), a, columns)
            if b < stop:
                break
            yield start, stop, rows
            rows, current = [], next(todo, None)
        if current is None:
            return
    if current is not None:
        raise changed(unit.url, unit.stop, f"only {at} rows")


def kept(
    batches: Iterable[pa.RecordBatch], entry: FileEntry, keep: Bool[np.ndarray, " rows"]
) -> Iterator[pa.RecordBatch]:
    """The kept rows of each batch, in order; batches of which nothing is kept are left out.

    Raises:
        CorpusError: there are more or fewer rows than entry.rows.
    """
    at = 0
    for batch in batches:
        mask = keep[at : at + batch.num_rows]
        at += batch.num_rows
        if at > entry.rows:
            raise changed(entry.url, entry.rows, "more rows")
        if mask.all():
            yield batch
        elif mask.any():
            yield batch.filter(pa.array(mask))
    if at != entry.rows:
        raise changed(entry.url, entry.rows, f"{at} rows")
