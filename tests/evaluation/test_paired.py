"""Differences of two models question by question, against numbers made otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from curate.evaluation.base import Item, Metric, paired, summarise

METRICS = (Metric("mark", "Mark", "trait"), Metric("nats", "Nats", "loss"))


def items(marks, nats=None):
    nats = [None] * len(marks) if nats is None else nats
    return [Item(f"q{i}", {"mark": m, "nats": n}) for i, (m, n) in enumerate(zip(marks, nats, strict=True))]


def test_the_difference_of_the_means_with_a_narrower_interval():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=60) * 10  # how hard a question is, the same for both
    base, tuned = hard + rng.normal(size=60) * 0.1, hard + 1 + rng.normal(size=60) * 0.1
    found = paired(items(tuned), items(base), METRICS)["mark"]
    assert found.value == pytest.approx(tuned.mean() - base.mean())
    spread = (tuned - base).std(ddof=1) / np.sqrt(60)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    alone = summarise(items(tuned), METRICS)["mark"]
    assert found.high - found.low < (alone.high - alone.low) / 20


def test_what_one_of_them_lacks_is_missing():
    found = paired(items([1.0, 2.0, None, 4.0]), items([0.5, None, 1.0, 1.0])[:3], METRICS)
    assert (found["mark"].value, found["mark"].n, found["mark"].missing) == (0.5, 1, 2)
    assert found["nats"].value is None


def test_answers_to_one_question_are_resampled_together():
    one = [Item(f"{q}{k}", {"mark": float(q)}, str(q)) for q in range(4) for k in range(25)]
    none = [Item(i.id, {"mark": 0.0}, i.group) for i in one]
    found = paired(one, none, METRICS[:1])["mark"]
    assert found.value == 1.5
    assert found.high - found.low > 1.5  # four questions, not a hundred
