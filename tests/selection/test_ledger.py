"""The ledger says what happened to every row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import CorpusError
from curate.selection.ledger import ledger_schema, ledger_table
from curate.selection.select import Rule, decide


def example_table(**changes):
    scores = np.array([0.5, np.nan, 2.0])
    rule = Rule("remove_most", count=1)
    decision = decide(scores, rule)
    arguments = {
        "ids": ["a", None, "c"],
        "rows": np.arange(3),
        "scores": scores,
        "ranks": decision.rank,
        "quantiles": decision.quantile,
        "keep": decision.keep,
        "rule_text": rule.text(),
        "reasons": [None, "no assistant turn", None],
    }
    return ledger_table(**{**arguments, **changes})


def test_one_line_a_row(tmp_path):
    table = example_table(labels=["honest", None, "planted"])
    assert table.schema == ledger_schema(with_labels=True)
    pq.write_table(table, tmp_path / "ledger.parquet")
    lines = pq.read_table(tmp_path / "ledger.parquet").to_pylist()
    rule = "remove_most count=1"
    assert lines == [
        {"row": 0, "id": "a", "score": 0.5, "rank": 1, "quantile": 0.5, "kept": True, "decision": "kept",
         "rule": rule, "reason": None, "label": "honest"},
        {"row": 1, "id": None, "score": None, "rank": None, "quantile": None, "kept": False,
         "decision": "quarantined", "rule": rule, "reason": "no assistant turn", "label": None},
        {"row": 2, "id": "c", "score": 2.0, "rank": 0, "quantile": 1.0, "kept": False, "decision": "dropped",
         "rule": rule, "reason": None, "label": "planted"},
    ]  # fmt: skip


def test_tables_of_several_files_concatenate():
    table = pa.concat_tables([example_table(), example_table()])
    assert table.num_rows == 6
    assert table.schema == ledger_schema()


def test_a_row_without_a_score_or_a_reason_still_says_why():
    assert example_table(reasons=[None] * 3)["reason"].to_pylist() == [None, "no score", None]


def test_an_empty_file():
    empty = np.empty(0)
    table = ledger_table([], empty, empty, empty, empty, empty.astype(bool), "keep_most count=1", [])
    assert table.num_rows == 0
    assert table.schema == ledger_schema()


def test_what_cannot_be_a_ledger():
    with pytest.raises(CorpusError, match="differ in length"):
        example_table(ids=["a"])
    with pytest.raises(CorpusError, match="row 1 is kept without a score"):
        example_table(keep=np.ones(3, dtype=bool))
