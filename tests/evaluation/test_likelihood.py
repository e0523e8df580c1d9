"""Likelihoods against a plain log-softmax over the whole sequence, one row at a time."""

from __future__ import annotations

import pytest
import torch

from curate.corpus.render import Rendered
from curate.evaluation import likelihood
from curate.evaluation.likelihood import likelihoods
from tests.tiny import tiny_model

ROWS = [
    Rendered([5, 9, 17, 30, 31, 2], 3, 5, 6),
    Rendered([7, 8, 9], 1, 2, 3),
    Rendered([4, 40, 41, 42, 43, 44, 45, 46, 47, 2], 4, 9, 10),
    Rendered([60, 61, 62, 2, 99, 98], 0, 3, 4),  # from the first token on, which nothing predicts
    Rendered([11, 12, 2], 2, 2, 3),
]


def plain(model, row):
    logits = model(torch.tensor([row.input_ids])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return sum(float(log_p[t - 1, row.input_ids[t]]) for t in range(max(row.start, 1), row.end))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_against_log_softmax(kind, budget):
    model = tiny_model(kind)
    found = likelihoods(model, ROWS, budget, 3)
    assert [x.tokens for x in found] == [3, 2, 6, 3, 1]
    for row, x in zip(ROWS, found, strict=True):
        assert x.nats == pytest.approx(plain(model, row), abs=1e-4)


def test_logits_are_made_a_few_at_a_time(monkeypatch):
    model = tiny_model()
    whole = likelihoods(model, ROWS, 1000, 3)
    seen = []
    monkeypatch.setattr(likelihood, "_LOGITS", 2 * 320)
    monkeypatch.setattr(likelihood, "head_logits", lambda m, h: seen.append(len(h)) or m.get_output_embeddings()(h))
    assert likelihoods(model, ROWS, 1000, 3) == pytest.approx(whole)
    assert max(seen) == 2
    assert sum(seen) == 15  # response tokens only


def test_nothing_asked():
    assert likelihoods(tiny_model(), [], 100, 3) == []
