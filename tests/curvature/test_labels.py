"""Sampled labels: their distribution, their seeds, and the loss that they make."""

from __future__ import annotations

import pytest
import torch

from curate.curvature import labels
from curate.curvature.labels import sampled_response_loss
from curate.models import response_loss
from curate.models.batching import collate
from curate.models.tap import LayerTap
from tests.tiny import tiny_model

ROW = [1, 5, 6, 2, 4]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=2, vocab=8, scale=0.3).double()


def last_of(model, rows):
    ids, _ = collate(rows, 3)
    return LayerTap(model, [2])(ids)[2]


def drawn(model, last, starts, ends, seeds, monkeypatch):
    """The labels themselves, row by row."""
    seen = []

    def spy(model, last, starts, ends, targets):
        states = last[response_loss.predicting_mask(starts, ends, last.shape[1], last.device)]
        for i in range(0, len(states), 3):
            seen.append(targets(model.get_output_embeddings()(states[i : i + 3]), slice(i, i + 3)))
        return last.sum()

    monkeypatch.setattr(labels, "summed_cross_entropy", spy)
    sampled_response_loss(model, last, starts, ends, seeds)
    return torch.cat(seen)


def test_labels_follow_the_models_distribution(model, monkeypatch):
    n = 4000
    last = last_of(model, [ROW]).expand(n, -1, -1)
    got = drawn(model, last, [3] * n, [5] * n, range(n), monkeypatch).reshape(n, 2)
    want = model(input_ids=torch.tensor([ROW])).logits[0, 2:4].softmax(-1)
    for t in range(2):
        shares = torch.bincount(got[:, t], minlength=8) / n
        spread = (want[t] * (1 - want[t]) / n).sqrt()
        assert ((shares - want[t]).abs() < 4.5 * spread).all()
    assert abs(float(torch.corrcoef(got.T.double())[0, 1])) < 0.06  # the draws of two tokens are independent


def test_a_rows_labels_do_not_depend_on_its_batch(model, monkeypatch):
    rows, starts, ends, seeds = [ROW, [7, 2, 1], [3, 3, 3, 3]], [2, 0, 1], [5, 3, 4], [11, 12, 13]
    together = drawn(model, last_of(model, rows), starts, ends, seeds, monkeypatch)
    alone = [
        drawn(model, last_of(model, [row]), [start], [end], [seed], monkeypatch)
        for row, start, end, seed in zip(rows, starts, ends, seeds, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert [len(part) for part in alone] == [3, 2, 3]
    other = drawn(model, last_of(model, rows), starts, ends, [21, 22, 23], monkeypatch)
    assert not torch.equal(together, other)


def test_an_unlikely_draw_stays_inside_the_vocabulary(model, monkeypatch):
    monkeypatch.setattr(labels, "_uniform", lambda seed, n: torch.full((n,), 1 - 1e-16, dtype=torch.float64))
    got = drawn(model.float(), last_of(model, [ROW]), [1], [5], [0], monkeypatch)
    model.double()
    assert int(got.max()) < 8


def test_the_loss_is_that_of_the_labels_in_chunks_too(model, monkeypatch):
    last = last_of(model, [ROW, [7, 2, 1]])
    chosen = drawn(model, last, [2, 0], [5, 3], [1, 2], monkeypatch)
    monkeypatch.undo()
    logits = model(input_ids=torch.tensor([ROW])).logits[0, 1:4]
    more = model(input_ids=torch.tensor([[7, 2, 1]])).logits[0, 0:2]
    want = torch.nn.functional.cross_entropy(torch.cat([logits, more]), chosen, reduction="sum")
    whole = sampled_response_loss(model, last, [2, 0], [5, 3], [1, 2])
    monkeypatch.setattr(response_loss, "_LOGITS", 16)  # two tokens at once
    torch.testing.assert_close(whole, want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sampled_response_loss(model, last, [2, 0], [5, 3], [1, 2]), whole)
