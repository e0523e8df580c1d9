"""Ledger: one line for every input row of a source file: its score, its rank, kept or not, and by which rule.

In: columns of equal length, in row order. Out: an Arrow table. Does not know where the table is written.

| column   | type   | meaning                                                                                  |
|----------|--------|------------------------------------------------------------------------------------------|
| row      | int64  | row of the source file, from 0                                                           |
| id       | string | id of the example; null where the row could not be read                                  |
| score    | double | the score that was ranked; null where the row has none                                   |
| rank     | int64  | 0 = highest score, over the corpus (in the group, for a rule per group); null = no score |
| quantile | double | share of scored rows that rank at or below this one, in (0, 1]; null = no score          |
| kept     | bool   | the row is in the curated shards                                                         |
| decision | string | "kept", "dropped" (by the rule), "quarantined" or "unscored" (no such score; not kept)     |
| rule     | string | the rule; the same on every line, so that a line can be read by itself                   |
| reason   | string | why the row was quarantined; else null                                                   |
| label    | string | the row's label, if the source has labels; the column is absent otherwise                |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.errors import CorpusError

_NO_REASON = "no score"


def ledger_schema(with_labels: bool = False) -> pa.Schema:
    """The columns above; `rule` and `decision` are dictionary-encoded, so they cost a byte or so a row."""
    word = pa.dictionary(pa.int32(), pa.string())
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("rank", pa.int64()),
        pa.field("quantile", pa.float64()),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("decision", word, nullable=False),
        pa.field("rule", word, nullable=False),
        pa.field("reason", pa.string()),
    ]
    if with_labels:
        fields.append(pa.field("label", pa.string()))
    return pa.schema(fields)


def ledger_table(
    ids: Sequence[str | None],
    rows: NDArray[np.integer[Any]],
    scores: NDArray[np.floating[Any]],
    ranks: NDArray[np.integer[Any]],
    quantiles: NDArray[np.floating[Any]],
    keep: NDArray[np.bool_],
    rule_text: str,
    reasons: Sequence[str | None],
    labels: Sequence[str | None] | None = None,
) -> pa.Table:
    """The ledger of one source file; every argument but `rule_text` has one entry a row, NaN and -1 for no score.

    Raises:
        CorpusError: the arguments differ in length, or a row without a score is marked as kept.
    """
    columns = (ids, rows, scores, ranks, quantiles, keep, reasons) + (() if labels is None else (labels,))
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise CorpusError(f"the columns of a ledger differ in length: {[len(column) for column in columns]}")
    scores = np.asarray(scores, dtype=np.float64)
    keep = np.asarray(keep, dtype=bool)
    unscored = np.isnan(scores)
    if (keep & unscored).any():
        raise CorpusError(f"row {np.asarray(rows)[keep & unscored][0]} is kept without a score")
    words = pa.array(["kept", "dropped", "quarantined", "unscored"])
    bad = np.array([bool(reason) for reason in reasons], dtype=bool)
    which = np.where(unscored, np.where(bad, 2, 3), np.where(keep, 0, 1)).astype(np.int32)
    why = [(reason or _NO_REASON) if missing else None for reason, missing in zip(reasons, unscored, strict=True)]
    data: list[pa.Array] = [
        pa.array(np.asarray(rows, dtype=np.int64)),
        pa.array(ids, pa.string(), from_pandas=True),
        pa.array(scores, mask=unscored),
        pa.array(np.asarray(ranks, dtype=np.int64), mask=unscored),
        pa.array(np.asarray(quantiles, dtype=np.float64), mask=unscored),
        pa.array(keep),
        pa.DictionaryArray.from_arrays(pa.array(which), words),
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(keep), dtype=np.int32)), pa.array([rule_text])),
        pa.array(why, pa.string()),
    ]
    if labels is not None:
        data.append(pa.array(labels, pa.string(), from_pandas=True))
    return pa.Table.from_arrays(data, schema=ledger_schema(labels is not None))
