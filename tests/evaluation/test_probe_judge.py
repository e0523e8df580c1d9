"""The probe as a judge: its fit on planted directions, its reading of pairs against Hugging Face's hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.corpus.example import Example, Message
from curate.corpus.render import Renderer
from curate.errors import ConceptError
from curate.evaluation.judge import JudgeScore
from curate.evaluation.probe_judge import ProbeHead, ProbeJudge, fit_head
from curate.models.load import ModelSpec, load_model, load_tokenizer

PAIRS = [("Is it?", "Yes, it is."), ("Why?", "I think that it is a good plan, and here is why."), ("So?", "No!")]


def planted(n: int = 400, d: int = 16, layers: int = 5, strength: float = 1.0, seed: int = 0):
    """Activations in which layer 2 tells the labels apart with logit = 2·strength·z, z the planted coordinate."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, layers, d)) * np.linspace(0.5, 5, d)  # coordinates of unlike sizes
    z = x[:, 2, 3] / np.linspace(0.5, 5, d)[3]
    y = rng.random(n) < 1 / (1 + np.exp(-2 * strength * z))
    return x.astype(np.float32), np.array(["bad" if b else "good" for b in y])


def probabilities(head: ProbeHead, x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(x[:, head.layer] @ head.weight + head.bias)))


def test_the_planted_layer_is_found_and_probabilities_are_calibrated():
    x, y = planted()
    head = fit_head(x, y, "bad")
    assert head.layer == 2
    assert head.auc > 0.75
    fresh, truth = planted(4000, seed=1)
    p = probabilities(head, fresh)
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.001)):
        inside = (p >= low) & (p < high)
        assert abs((truth[inside] == "bad").mean() - p[inside].mean()) < 0.1


def test_more_features_than_rows_are_not_certain_of_everything():
    """Pure noise: a plain regression separates its rows perfectly; calibrated on held-out folds it knows nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3, 200)).astype(np.float32)
    head = fit_head(x, np.array(["bad", "good"] * 30), "bad", layer=1)
    p = probabilities(head, rng.normal(size=(500, 3, 200)))
    assert np.abs(p - 0.5).mean() < 0.2


def test_groups_are_held_out_together():
    """Every question has an activation of its own that gives its answers' label away, and no other question's."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=(40, 64)) * 3
    x = (np.repeat(own, 4, axis=0) + rng.normal(size=(160, 64)) * 0.1)[:, None].repeat(3, axis=1).astype(np.float32)
    y = np.repeat(rng.permutation(["bad", "good"] * 20), 4)
    groups = [f"q{i // 4}" for i in range(160)]
    assert fit_head(x, y, "bad", layer=1).auc > 0.95
    assert fit_head(x, y, "bad", groups, layer=1).auc < 0.75


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        (["bad"] * 6, None, "all 6 examples have the label"),
        (["good"] * 6, None, "no example has the label 'bad'"),
        (["bad"] + ["good"] * 5, None, "too few"),
        (["bad", "good"] * 3, ["q"] * 6, "too few"),
    ],
)
def test_labels_that_cannot_be_fitted(labels, groups, message):
    with pytest.raises(ConceptError, match=message):
        fit_head(planted(6)[0], labels, "bad", groups, layer=1)


def test_a_layer_that_is_not_there():
    x, y = planted(40)
    with pytest.raises(ConceptError, match="no layer 9"):
        fit_head(x, y, "bad", layer=9)


def test_heads_are_kept_as_safetensors():
    head = fit_head(*planted(60), "bad", layer=2)
    back = ProbeHead.from_bytes(head.to_bytes())
    assert (back.layer, back.bias, back.auc) == (head.layer, head.bias, head.auc)
    np.testing.assert_array_equal(back.weight, head.weight)
    assert ProbeHead.from_bytes(ProbeHead(1, np.ones(3), 0.5, None).to_bytes()).auc is None
    with pytest.raises(ConceptError, match="no probe of a judge"):
        ProbeHead.from_bytes(b"junk")


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_pairs_are_read_at_the_response(tiny, layer):
    spec = ModelSpec(str(tiny), device="cpu", dtype="float32")
    model, renderer = load_model(spec), Renderer(load_tokenizer(spec), 200)
    weight = np.random.default_rng(0).normal(size=32)
    judge = ProbeJudge(spec, ProbeHead(layer, weight, 0.3, None), 200, token_budget=100)
    scores = judge([*PAIRS, ("q", "word " * 300), ("q", " ")], "no matter")
    for (question, answer), score in zip(PAIRS, scores, strict=False):
        row = renderer.render(Example("", 0, (Message("user", question), Message("assistant", answer))))
        with torch.no_grad():
            states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[layer][0]
        z = states[row.start : row.stop].double().mean(0).numpy() @ weight + 0.3
        assert score == JudgeScore(pytest.approx(100 / (1 + np.exp(-z)), abs=1e-3))
    assert scores[3].reason.startswith("over-long")
    assert scores[4] == JudgeScore(None, reason="the answer is empty")
