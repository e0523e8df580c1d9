"""Kept rows of parts against a plain list; batches of workers against the step's rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.errors import TrainingError
from curate.training.batches import NO_LOSS, BatchRows, StepPlan, make_batch
from curate.training.rows import TokenPart, load_rows, row_lengths
from curate.training.spec import TrainingSpec
from tests.training.sample import dataset, make_rows, part_table, shuffled_steps

ROWS = make_rows(30)


def loaded(tmp_path, keep, parts, tables):
    found = load_rows(parts, keep, tmp_path, lambda urls: [tables[u] for u in urls])
    return [(row["input_ids"], row["start"]) for row in found]


def test_kept_rows_of_several_files(tmp_path):
    # Two files of 12 and 18 rows: the second begins in a part that lacks a quarantined row (its row 5).
    second = part_table(ROWS[12:]).filter([i != 5 for i in range(18)])
    tables = {"a": part_table(ROWS[:12]), "b1": second.slice(0, 9), "b2": second.slice(9)}
    parts = [TokenPart("a", 0, 12), TokenPart("b1", 12, 30), TokenPart("b2", 12, 30)]
    keep = np.random.default_rng(0).random(30) < 0.5
    keep[17] = True
    want = [(r[0][: r[2]], r[1]) for i, r in enumerate(ROWS) if keep[i] and i != 17]
    assert loaded(tmp_path, keep, parts, tables) == want
    everything = loaded(tmp_path, None, parts, tables)
    assert len(everything) == 29


def test_rows_of_a_larger_run_are_left_out(tmp_path):
    found = loaded(tmp_path, None, [TokenPart("a", 0, 10)], {"a": part_table(ROWS)})
    assert found == [(r[0][: r[2]], r[1]) for r in ROWS[:10]]


def test_a_row_without_a_token_to_learn_is_left_out(tmp_path):
    rows = [([7], 0, 1), ([7, 8], 0, 2), ([7, 8], 2, 2)]
    assert loaded(tmp_path, None, [TokenPart("a", 0, 3)], {"a": part_table(rows)}) == [([7, 8], 0)]


def test_no_rows(tmp_path):
    with pytest.raises(TrainingError, match="no rows are left"):
        loaded(tmp_path, np.zeros(30, bool), [TokenPart("a", 0, 30)], {"a": part_table(ROWS)})
    with pytest.raises(TrainingError, match="no rows are left"):
        load_rows([], None, tmp_path, lambda urls: [])


@pytest.mark.parametrize(("workers", "micro"), [(1, 4), (2, 4), (4, 1), (3, 4)])
def test_workers_share_the_rows_of_every_step(tmp_path, workers, micro):
    lengths = row_lengths(dataset(ROWS, tmp_path))
    np.testing.assert_array_equal(lengths, [r[2] for r in ROWS])
    training = TrainingSpec(batch_size=12, micro_batch=micro, workers=workers, epochs=2, seed=5)
    plans = [StepPlan(lengths, training, rank) for rank in range(workers)]
    mine = [list(plan) for plan in plans]
    assert {len(batches) for batches in mine} == {len(plans[0])} == {6 * plans[0].accumulation}
    each = plans[0].accumulation
    for n, rows in enumerate(shuffled_steps(30, 12, 2, 5)):
        got = [i for batches in mine for batch in batches[n * each : (n + 1) * each] for i in batch]
        assert sorted(got) == sorted(rows)
        assert plans[0].sums(lengths)[n] == lengths[rows].sum()


def test_a_batch(tmp_path):
    batch = make_batch(BatchRows(dataset([([1, 2, 3, 4], 2, 4), ([5, 6], 0, 2)], tmp_path)).__getitems__([0, 1]))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    x = NO_LOSS
    assert batch["labels"].tolist() == [[x, x, 3, 4], [x, 6, x, x]]
    empty = make_batch([])
    assert empty["input_ids"].dtype == torch.long
    assert (empty["labels"] == x).all()
