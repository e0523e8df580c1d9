"""Arms of a sweep: which rows they keep, what is shared, what is refused. Expected rows are counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from curate.errors import ConfigError
from curate.training.arms import SweepSpec, Table, make_table, ranking_columns, rows_digest

N = 8
UP = np.arange(N, dtype=float)


def sweep(**more) -> SweepSpec:
    return SweepSpec(**{"fractions": [0.25, 0.5], "seeds": [0, 1], **more})


def kept(table: Table, arm: str) -> list[int]:
    found = next(a for a in table.arms if a.key == arm)
    return np.flatnonzero(table.trainings[found.training].keep).tolist()


def test_each_arm_keeps_the_rows_of_its_rule():
    table = make_table({"up": UP}, sweep())
    assert kept(table, "up/remove_most/0.25/s0") == [0, 1, 2, 3, 4, 5]
    assert kept(table, "up/remove_most/0.5/s1") == [0, 1, 2, 3]
    assert kept(table, "up/remove_least/0.25/s0") == [2, 3, 4, 5, 6, 7]
    assert kept(table, "full/s1") == list(range(N))
    arm = next(a for a in table.arms if a.key == "up/remove_most/0.25/s0")
    assert (arm.rows, arm.removed, arm.mode, arm.fraction, arm.seed) == (6, 0.25, "remove_most", 0.25, 0)
    base = table.arms[0]
    assert (base.kind, base.training, base.rows) == ("base", None, 0)
    assert len({a.key for a in table.arms}) == len(table.arms)


def test_arms_of_the_same_rows_and_seed_share_a_training():
    table = make_table({"up": UP, "twice": 2 * UP, "down": -UP}, sweep(random=0))
    # down removes most where up removes least: four sets of rows and the full one, each with two seeds.
    assert len(table.trainings) == 10
    assert len(table.arms) == 1 + 2 + 3 * 2 * 2 * 2
    by = {a.key: a.training for a in table.arms}
    assert by["up/remove_most/0.25/s0"] == by["twice/remove_most/0.25/s0"] == by["down/remove_least/0.25/s0"]
    assert by["up/remove_most/0.25/s0"] != by["up/remove_most/0.25/s1"]
    masks = {id(t.keep) for t in table.trainings.values()}
    assert len(masks) == 5  # seeds share the mask in memory too


def test_keep_most_of_a_quarter_is_remove_least_of_three():
    table = make_table({"up": UP}, sweep(modes=["remove_least", "keep_most"], fractions=[0.25, 0.75], random=0))
    by = {a.key: a for a in table.arms}
    assert by["up/keep_most/0.25/s0"].training == by["up/remove_least/0.75/s0"].training
    assert by["up/keep_most/0.25/s0"].removed == 0.75


def test_random_arms_are_other_draws_for_every_seed_and_nested():
    table = make_table({"up": UP}, sweep(random=2))
    arms = [a for a in table.arms if a.kind == "random"]
    assert len(arms) == 2 * 2 * 2  # amounts × rankings × seeds: both modes have one arm
    assert {a.rows for a in arms} == {4, 6}
    assert len({rows_digest(table.trainings[a.training].keep) for a in arms if a.rows == 6}) > 1
    for ranking in (0, 1):
        for seed in (0, 1):
            few, many = (kept(table, f"random.{ranking}/remove_most/{f}/s{seed}") for f in ("0.5", "0.25"))
            assert set(few) < set(many)
    again = make_table({"up": UP}, sweep(random=2))
    assert again.trainings.keys() == table.trainings.keys()


def test_random_arms_do_not_depend_on_the_columns_that_rank():
    one, other = make_table({"up": UP}, sweep()), make_table({"x": UP[::-1] ** 2}, sweep())
    for arm in (a.key for a in one.arms if a.kind == "random"):
        assert kept(one, arm) == kept(other, arm)


def test_a_row_that_one_column_does_not_score_is_in_no_arm():
    holes = UP.copy()
    holes[[1, 6]] = np.nan
    table = make_table({"up": UP, "holes": holes}, sweep())
    assert table.pool_rows == 6
    assert table.total == N
    for training in table.trainings.values():
        assert not training.keep[[1, 6]].any()
    assert kept(table, "full/s0") == kept(table, "full/s1") == [0, 2, 3, 4, 5, 7]
    assert kept(table, "up/remove_most/0.5/s0") == [0, 2, 3]


def test_controls_can_be_left_out():
    table = make_table({"up": UP}, sweep(random=0, full=False, base=False))
    assert {a.kind for a in table.arms} == {"column"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fractions": [0.5, 1.0]}, r"sweep\.fractions has 1\.0; each must lie between 0 and 1"),
        ({"fractions": [0.0]}, r"sweep\.fractions has 0\.0"),
        ({"fractions": [float("nan")]}, r"sweep\.fractions has nan"),
        ({"fractions": [0.5, 0.5]}, r"sweep\.fractions has 0\.5 twice"),
        ({"fractions": []}, r"sweep\.fractions is empty"),
        ({"modes": ["remove_mots"]}, r"did you mean 'remove_most'"),
        ({"seeds": []}, r"sweep\.seeds is empty"),
        ({"seeds": [-1]}, "must not be negative"),
        ({"random": -1}, r"sweep\.random is -1"),
        ({"at_once": 0}, r"sweep\.at_once is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        sweep(**change)


def test_an_arm_with_no_rows_left_is_named():
    with pytest.raises(ConfigError, match=r"arm '.*remove_most 0\.9' cannot be trained.*leaves none of the 1 scored"):
        make_table({"up": np.array([1.0, np.nan])}, sweep(fractions=[0.9]))


def test_no_row_that_all_columns_score():
    with pytest.raises(ConfigError, match=r"no row is scored by all columns .*a: 1, b: 1 of 2"):
        make_table({"a": np.array([1.0, np.nan]), "b": np.array([np.nan, 1.0])}, sweep())


def test_a_column_that_is_called_as_the_controls_are():
    with pytest.raises(ConfigError, match=r"sweep\.columns has 'random'.*set sweep\.random=0"):
        make_table({"random": UP}, sweep())
    arms = make_table({"random": UP}, sweep(random=0)).arms
    assert len({a.key for a in arms}) == len(arms)


def test_columns_that_rank():
    assert ranking_columns(["a", "random", "b"], None) == ["a", "b"]
    assert ranking_columns(["a", "random"], ["random"]) == ["random"]
    with pytest.raises(ConfigError, match=r"sweep\.columns has 'vector_filtr', which was not scored.*'vector_filter'"):
        ranking_columns(["vector_filter"], ["vector_filtr"])
    with pytest.raises(ConfigError, match="no score column is left"):
        ranking_columns(["random"], None)
