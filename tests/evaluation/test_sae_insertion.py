"""Drops by insertion, the choice of a layer, and how much of the states an SAE keeps, each by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curate.concepts.sae import SAE, reconstruct
from curate.errors import ConfigError
from curate.evaluation.base import Item, Measure, Metric
from curate.evaluation.multiple_choice import MultipleChoice
from curate.evaluation.sae_insertion import LayerResult, Quality, QualitySums, choose, drop, drop_items, pick_metric
from tests.conftest import write_jsonl

METRICS = {sense: Metric("m", "M", sense) for sense in ("capability", "loss", "trait", "count")}


def items(*values: float | None) -> list[Item]:
    return [Item(f"q{i}", {"m": v}) for i, v in enumerate(values)]


@pytest.mark.parametrize(("sense", "want"), [("capability", 0.5), ("loss", -0.5), ("count", -0.5), ("trait", 0.5)])
def test_a_drop_is_worse_whatever_more_means(sense, want):
    before, after = items(1.0, 1.0, None, 0.0), items(0.0, 1.0, 1.0, None)
    found = drop(before, after, METRICS[sense])
    assert found.value == pytest.approx(want)
    assert (found.n, found.missing) == (2, 2)
    assert found.low <= found.value <= found.high
    assert [i.values["m"] for i in drop_items(before, after, METRICS["capability"])] == [1.0, 0.0, None, None]


def test_a_trait_may_change_either_way():
    up, down = (drop(items(50, 52, 54), items(*after), METRICS["trait"]) for after in ((60, 62, 61), (40, 42, 47)))
    assert up.value == pytest.approx(9.0)
    assert down.value == pytest.approx(9.0)
    assert up.low <= up.value <= up.high
    assert down.low <= down.value <= down.high


def result(layer: int, value: float | None, explained: float = 0.9) -> LayerResult:
    m = Measure(value, value, value, 3, 0)
    return LayerResult(layer, f"u{layer}", m, m, m, Quality(explained, explained, 4.0, 0.0, 10), {})


def test_the_smallest_drop_of_the_middle_half_is_chosen():
    found = [result(1, 0.0), result(4, 0.3), result(5, 0.1), result(6, 0.1, 0.95), result(9, 0.05)]
    assert choose(found, range(3, 8)) == (6, 1)  # of equal drops the one that explains more
    assert choose([result(5, 0.1), result(6, 0.1)], range(3, 8)) == (5, 5)
    assert choose([result(1, 0.2), result(9, 0.1)], range(3, 8)) == (9, 9)  # none in the middle half
    assert choose([result(4, None), result(5, 0.5)], range(3, 8)) == (5, 5)
    with pytest.raises(ConfigError, match="not one item was answered"):
        choose([result(4, None)], range(3, 8))


def test_the_metric_that_decides(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [{"question": "a?", "choices": ["x", "y"], "answer": 0}])
    both = {"mcq": MultipleChoice(str(tmp_path / "q.jsonl"))}
    assert pick_metric(both, None)[1].name == "accuracy"
    assert pick_metric(both, "mcq.unparsed")[1].name == "unparsed"
    with pytest.raises(ConfigError, match=r"did you mean 'mcq\.accuracy'"):
        pick_metric(both, "mcq.acuracy")


def test_quality_by_the_formulas():
    draw = torch.Generator().manual_seed(0)
    d, h, n = 6, 10, 400
    sae = SAE(
        torch.randn(h, d, generator=draw), torch.zeros(h), torch.randn(h, d, generator=draw),
        torch.full((d,), 0.2), torch.full((d,), 0.2), "topk", 1, "s", k=3,
    )  # fmt: skip
    sae = replace(sae, b_enc=torch.where(torch.arange(h) == 4, -1e6, 0.0))
    x = torch.randn(n, d, generator=draw) + 0.5
    sums = QualitySums(sae)
    for part in x.split(150):
        sums.add(part)
    found = sums.result()
    error = (x - reconstruct(sae, x)).double().square().sum(-1)
    assert found.explained_variance == pytest.approx(
        float(1 - error.sum() / (x - x.mean(0)).double().square().sum()), rel=1e-5
    )
    assert found.explained_tokens == pytest.approx(
        float(1 - (error / (x - 0.2).double().square().sum(-1)).mean()), rel=1e-5
    )
    assert found.dead == pytest.approx(0.1)
    assert found.tokens == n
    assert 2.5 < found.l0 <= 3
