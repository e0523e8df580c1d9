"""Linear datamodelling score and leave-k-out against scipy, exact linear models, and banks on disk."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from curate.errors import ConfigError, RecipeError, StorageError
from curate.evaluation.bank_files import load_bank, open_bank
from curate.evaluation.datamodel import Bank, draw_left_out, draw_subsets, leave_k_out, linear_datamodelling_score

ROWS, MODELS, NAMES = 40, 30, ("a", "b")


def linear_bank(noise: float = 0.0, kept: np.ndarray | None = None) -> tuple[Bank, np.ndarray]:
    """A bank whose outputs are sums of true scores, and those scores [rows, queries]."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(ROWS, 2))
    kept = draw_subsets(ROWS, MODELS, 0.5) if kept is None else kept
    return Bank(kept, kept @ true + noise * rng.normal(size=(len(kept), 2)), NAMES), true


def test_true_scores_predict_a_linear_model_wholly():
    bank, true = linear_bank()
    found = linear_datamodelling_score(bank, true)
    assert found.score.value == pytest.approx(1.0)
    assert (found.score.low, found.score.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert linear_datamodelling_score(bank, -true).score.value == pytest.approx(-1.0)
    assert found.models == MODELS


def test_it_is_the_mean_of_scipys_rank_correlations():
    bank, true = linear_bank(noise=3.0)
    found = linear_datamodelling_score(bank, true)
    each = [spearmanr(bank.kept @ true[:, q], bank.outputs[:, q]).statistic for q in range(2)]
    assert found.by_query == pytest.approx(each)
    assert found.score.value == pytest.approx(np.mean(each))
    one = linear_datamodelling_score(bank, true[:, 0])  # one column for both queries
    assert one.by_query[1] == pytest.approx(spearmanr(bank.kept @ true[:, 0], bank.outputs[:, 1]).statistic)


def test_the_interval_agrees_with_resampling_models_one_by_one():
    bank, true = linear_bank(noise=3.0)
    found = linear_datamodelling_score(bank, true, replicates=2000)
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(600):
        i = rng.integers(0, MODELS, MODELS)
        drawn.append(np.mean([spearmanr(bank.kept[i] @ true[:, q], bank.outputs[i, q]).statistic for q in range(2)]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.score.low == pytest.approx(low, abs=0.05)
    assert found.score.high == pytest.approx(high, abs=0.05)
    assert linear_datamodelling_score(bank, true, replicates=2000) == found


def test_a_constant_added_to_all_scores_changes_nothing_where_sets_are_of_one_size():
    bank, true = linear_bank(noise=1.0)
    assert (bank.kept.sum(axis=1) == ROWS // 2).all()
    moved = linear_datamodelling_score(bank, true + 7.0)
    assert moved.score.value == pytest.approx(linear_datamodelling_score(bank, true).score.value)


def test_models_of_the_same_rows_are_averaged():
    bank, true = linear_bank()
    twice = Bank(np.concatenate([bank.kept, bank.kept]), np.concatenate([bank.outputs + 1, bank.outputs - 1]), NAMES)
    mean = twice.averaged()
    assert (mean.kept == bank.kept).all()
    assert mean.outputs == pytest.approx(bank.outputs)
    assert linear_datamodelling_score(twice, true).models == MODELS


def test_a_query_without_spread_counts_in_no_mean():
    bank, true = linear_bank()
    flat = Bank(bank.kept, np.stack([bank.outputs[:, 0], np.ones(MODELS)], axis=1), NAMES)
    found = linear_datamodelling_score(flat, true)
    assert found.score.value == pytest.approx(1.0)
    assert np.isnan(found.by_query[1])


def test_leave_k_out_compares_with_models_of_all_rows():
    whole = np.ones((2, ROWS), dtype=bool)
    bank, true = linear_bank(kept=np.concatenate([whole, draw_left_out(ROWS, 4, 8)]))
    found = leave_k_out(bank, true, k=4)
    assert found.agreement.score.value == pytest.approx(1.0)
    assert found.predicted == pytest.approx(found.found)  # a linear model loses just the sum
    assert found.noise == pytest.approx((0.0, 0.0))
    with pytest.raises(ConfigError, match=r"lack exactly 5.*its models lack 4"):
        leave_k_out(bank, true, k=5)
    with pytest.raises(ConfigError, match="all rows"):
        leave_k_out(linear_bank()[0], true, k=20)


def test_groups_left_out_do_not_overlap_while_there_are_rows():
    left_out = ~draw_left_out(ROWS, 6, 6)
    assert (left_out.sum(axis=1) == 6).all()
    assert left_out.sum(axis=0).max() == 1
    assert (~draw_left_out(ROWS, 6, 20)).sum(axis=1).tolist() == [6] * 20


@pytest.mark.parametrize(
    ("scores", "message"),
    [(np.zeros(ROWS + 1), "do not fit"), (np.zeros((ROWS, 3)), "do not fit"), (np.full(ROWS, np.nan), "40 of the")],
)
def test_scores_that_do_not_fit_are_refused(scores, message):
    with pytest.raises(ConfigError, match=message):
        linear_datamodelling_score(linear_bank()[0], scores)


def test_what_no_bank_can_be_is_refused():
    bank, true = linear_bank()
    with pytest.raises(ConfigError, match="at least 3"):
        linear_datamodelling_score(Bank(bank.kept[:2], bank.outputs[:2], NAMES), true)
    with pytest.raises(ConfigError, match="query 'b'"):
        Bank(bank.kept, np.where(np.arange(2) == 1, np.nan, bank.outputs), NAMES)
    with pytest.raises(ConfigError, match="queries"):
        Bank(bank.kept, bank.outputs, ("a",))
    with pytest.raises(ConfigError, match="bool"):
        Bank(bank.kept.astype(float), bank.outputs, NAMES)
    with pytest.raises(ConfigError, match="share"):
        draw_subsets(ROWS, 3, 1.0)
    with pytest.raises(ConfigError, match="leave 40"):
        draw_left_out(ROWS, ROWS, 3)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_bank_on_disk_grows_and_serves_every_method(scheme, tmp_path):
    url = f"{scheme}{tmp_path}/bank"
    bank, true = linear_bank()
    place = open_bank(url, ROWS, NAMES, {"model": "tiny"})
    for i in (2, 0, 1, 3):
        place.add(bank.kept[i], bank.outputs[i], seed=i)
    again = open_bank(url, ROWS, NAMES, {"model": "tiny"})  # another process, later
    missing = [i for i in range(MODELS) if again.key(bank.kept[i], i) not in again.present()]
    assert missing == list(range(4, MODELS))
    for i in missing:
        again.add(bank.kept[i], bank.outputs[i], seed=i)
    found = load_bank(url)
    assert found.names == NAMES
    assert found.recipe == {"model": "tiny"}
    for method in (true, -true, np.random.default_rng(1).normal(size=ROWS)):
        kept = linear_datamodelling_score(bank, method).score.value
        assert linear_datamodelling_score(found, method).score.value == pytest.approx(kept)


def test_a_bank_of_another_recipe_or_a_broken_one_is_refused(tmp_path):
    url = str(tmp_path / "bank")
    place = open_bank(url, ROWS, NAMES, {"model": "tiny"})
    with pytest.raises(RecipeError, match=r"recipe\.model"):
        open_bank(url, ROWS, NAMES, {"model": "other"})
    with pytest.raises(ConfigError, match="41"):
        place.add(np.ones(ROWS + 1, dtype=bool), np.zeros(2))
    place.add(np.ones(ROWS, dtype=bool), np.zeros(2))
    (file,) = (tmp_path / "bank" / "models").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(StorageError, match=file.name):
        place.load()
    with pytest.raises(StorageError, match="no bank"):
        load_bank(str(tmp_path / "nowhere"))
    (tmp_path / "bank" / "bank.json").write_text("{")
    with pytest.raises(StorageError, match="index"):
        load_bank(url)
