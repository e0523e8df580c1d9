"""What evaluations leave behind: responses of a model to an evaluator's questions, items, measures.

<store>/responses/<digest>/    answers.parquet, likelihoods.parquet: what the model said; no judge has a part in it
<store>/evaluations/<digest>/  items.parquet: id, group, one column a metric, detail as JSON
                               measures.json: written last; its presence says that the evaluation is whole
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from connectors import storage
from curate.errors import StorageError
from curate.evaluation.base import Item, Likelihood, Measure, Metric
from curate.runtime.output import read_part

MEASURES, ITEMS = "measures.json", "items.parquet"
ANSWERS, LIKELIHOODS = "answers.parquet", "likelihoods.parquet"
_OWN = ("id", "group", "detail")


@dataclass(frozen=True)
class Answer:
    """An engine's answer to a prompt; `tokens` counts it with its end of turn. `finish_reason` as in Generated."""

    id: str
    text: str
    tokens: int
    finish_reason: str


def save_answers(folder: str, answers: Sequence[Answer]) -> None:
    """Write a model's answers to all prompts of an evaluator, at once or not at all."""
    _write(storage.join(folder, ANSWERS), [asdict(a) for a in answers], _ANSWERS)


def load_answers(folder: str) -> list[Answer] | None:
    """What `save_answers` wrote; None where there is nothing yet."""
    rows = _read(storage.join(folder, ANSWERS))
    return None if rows is None else [Answer(**row) for row in rows]


def save_likelihoods(folder: str, found: Mapping[str, Likelihood]) -> None:
    """Write the likelihoods of all candidates that the model could read."""
    _write(storage.join(folder, LIKELIHOODS), [{"id": k, **asdict(v)} for k, v in found.items()], _LIKELIHOODS)


def load_likelihoods(folder: str) -> dict[str, Likelihood] | None:
    """What `save_likelihoods` wrote; None where there is nothing yet."""
    rows = _read(storage.join(folder, LIKELIHOODS))
    return None if rows is None else {row["id"]: Likelihood(row["nats"], row["tokens"]) for row in rows}


def save_items(folder: str, items: Sequence[Item], metrics: Sequence[Metric]) -> None:
    """Write items with the values of `metrics`."""
    names = [m.name for m in metrics]
    schema = pa.schema(
        [("id", pa.string()), ("group", pa.string()), *((n, pa.float64()) for n in names), ("detail", pa.string())]
    )
    rows = [
        {
            "id": i.id,
            "group": i.group,
            **{n: i.values.get(n) for n in names},
            "detail": json.dumps(i.detail, ensure_ascii=False, default=str),
        }
        for i in items
    ]
    _write(storage.join(folder, ITEMS), rows, schema)


def load_items(folder: str) -> list[Item]:
    """The items of an evaluation (`Evaluation.url`). A metric that does not apply to an item is None in it as well.

    Raises:
        StorageError: there are none.
    """
    rows = _read(storage.join(folder, ITEMS))
    if rows is None:
        raise StorageError(f"there is no evaluation at {folder}; run `curate evaluate` first")
    return [
        Item(
            row["id"],
            {name: value for name, value in row.items() if name not in _OWN},
            row["group"],
            json.loads(row["detail"]),
        )
        for row in rows
    ]


def save_measures(folder: str, measures: Mapping[str, Measure], facts: Mapping[str, Any]) -> None:
    """Write the measures by metric, and what they are of; the last file of an evaluation."""
    body = {"measures": {name: asdict(m) for name, m in measures.items()}, **facts}
    storage.write_atomic(storage.join(folder, MEASURES), json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def load_measures(folder: str) -> dict[str, Measure] | None:
    """Measures by metric; None where the evaluation is not whole."""
    url = storage.join(folder, MEASURES)
    if not storage.exists(url):
        return None
    try:
        return {name: Measure(**m) for name, m in json.loads(storage.read_text(url))["measures"].items()}
    except (ValueError, KeyError, TypeError) as e:
        raise StorageError(f"{url} cannot be read ({e}); remove {folder} and run again") from None


_ANSWERS = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("tokens", pa.int64()), ("finish_reason", pa.string())]
)
_LIKELIHOODS = pa.schema([("id", pa.string()), ("nats", pa.float64()), ("tokens", pa.int64())])


def _write(url: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    storage.write_atomic(url, sink.getvalue().to_pybytes())


def _read(url: str) -> list[dict[str, Any]] | None:
    return read_part(url).to_pylist() if storage.exists(url) else None
