"""Rows to train on: the kept rows of a corpus' token parts, as one Arrow file that is mapped into memory.

In: parts in the order of the corpus, and which rows to keep. Out: a datasets.Dataset of (input_ids, start). In memory
are the parts that `read` reads ahead, never the corpus. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from curate.errors import TrainingError

if TYPE_CHECKING:
    from datasets import Dataset

TOKENS = pa.list_(pa.int32())
PART_COLUMNS = ("row", "input_ids", "start", "end")
_SCHEMA = pa.schema([("input_ids", TOKENS), ("start", pa.int32())])


@dataclass(frozen=True)
class TokenPart:
    """A part file of tokenised rows. Its row r is global row `first` + r; those from `stop` on are of a larger run."""

    url: str
    first: int
    stop: int


def load_rows(
    parts: Sequence[TokenPart],
    keep: Bool[np.ndarray, " rows"] | None,
    folder: str | Path,
    read: Callable[[Sequence[str]], Iterable[pa.Table]],
) -> Dataset:
    """The rows that `keep` marks (None: all), in the order of the corpus; written to `folder`, which must outlive them.

    Tokens after the end of turn are left out: they carry no loss, and no token before them sees them.

    Args:
        read: yields the tables of some part URLs, in order, with PART_COLUMNS.

    Raises:
        TrainingError: no row is left.
    """
    from datasets import Dataset

    path = Path(folder) / "rows.arrow"
    written = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for part, table in zip(parts, read([p.url for p in parts]), strict=True):
            place = table["row"].to_numpy() + part.first
            wanted = place < part.stop
            if keep is not None:
                wanted[wanted] = keep[place[wanted]]
            cut = _cut(table.filter(pa.array(wanted)))
            writer.write_table(cut)
            written += cut.num_rows
    if not written:
        raise TrainingError("no rows are left to train on: none was kept, or all of them were quarantined")
    return Dataset.from_file(str(path))


def _cut(table: pa.Table) -> pa.Table:
    """input_ids [:end] and start of each row that has a token to learn."""
    table = table.filter(pc.less(pc.max_element_wise(table["start"], 1), table["end"]))
    ids = table["input_ids"].combine_chunks()
    ends = table["end"].to_numpy()
    begins = ids.offsets.to_numpy()[:-1]
    offsets = np.concatenate([[0], np.cumsum(ends)])
    # Of each row the places begin … begin + end - 1 in the values of all rows.
    places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], ends)
    values = pa.array(ids.values.to_numpy(zero_copy_only=False)[places], pa.int32())
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return pa.table({"input_ids": lists, "start": table["start"].combine_chunks()}, _SCHEMA)


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of every row, int64 [rows]."""
    chunks = rows.data.column("input_ids").chunks
    return np.concatenate([pc.list_value_length(c).to_numpy(zero_copy_only=False) for c in chunks]).astype(np.int64)


def row_losses(rows: Dataset) -> np.ndarray:
    """Of every row the tokens that have a loss, int64 [rows]."""
    starts = np.concatenate([c.to_numpy(zero_copy_only=False) for c in rows.data.column("start").chunks])
    return row_lengths(rows) - np.maximum(starts, 1)
