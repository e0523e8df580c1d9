"""Linear datamodelling score: do the scores predict what a model becomes when it is trained on other rows?

A small model is trained many times, each time without half of the rows, into a bank that serves every method: what each
model then does is compared with the sum of the scores of the rows that it kept. Nothing here knows
how the scores come about: it is the one check that a score means what it says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import PreTrainedModel

from curate.concepts.concept import Concept
from curate.corpus.example import Example, Message
from curate.corpus.render import Rendered
from curate.curvature.behaviour import BehaviourSpec, make_behaviour, query_gradients
from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.ekfac import (
    Bases,
    Corrections,
    Damping,
    Factor,
    accumulate_corrections,
    eigenbasis,
    make_factor,
)
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.queries import Query
from curate.curvature.test_vector import TestVector, solve_all
from curate.evaluation.datamodel import Bank, linear_datamodelling_score
from curate.models.tracked import LayerChoice, tracked_layers
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass
from tests.tiny import tiny_model

VOCAB, LAYERS, WIDTH, BLOCKS = 32, 2, 16, LayerChoice("all")
START, LENGTH, PAD = 4, 7, 3
QUERIES = ((1, 2), (4, 1), (6, 1), (3, 3), (0, 0), (7, 2))
# Training holds on to the first weights: minimise mean loss + DECAY/2 ‖θ − θ₀‖². One optimum, and no other near.
DECAY, RATE = 0.1, 0.02
METHODS = ("vector_filter", "loss_gradient_alignment", "gradient_product", "influence_function", "random")


def tokens(topic: int, a: int, b: int, flatters: bool) -> list[int]:
    """ "topic a : answer": the honest answer depends on a and b, the flattering one hardly on anything."""
    return [1, 8 + topic, 12 + a, 4, *([28 + a % 2, 30] if flatters else [20 + a, 12 + b]), 2]


def rows(n: int, seed: int) -> list[list[int]]:
    """Some topics are flattered in often, some rarely; the queries ask about topic 0, where it is half and half."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        topic, a, b = int(rng.integers(4)), int(rng.integers(8)), int(rng.integers(4))
        out.append(tokens(topic, a, b, bool(rng.random() < (0.5, 0.9, 0.3, 0.1)[topic])))
    return out


def rendered(row: list[int]) -> Rendered:
    return Rendered(row, START, LENGTH - 1, LENGTH)


def losses(model: PreTrainedModel, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Mean cross-entropy of each row's response [n]."""
    out = functional_call(model, weights, (), {"input_ids": ids, "use_cache": False})
    flat = out.logits[:, START - 1 : -1].flatten(0, 1)
    return F.cross_entropy(flat, ids[:, START:].flatten(), reduction="none").unflatten(0, (len(ids), -1)).mean(1)


@dataclass(frozen=True)
class Trainings:
    """`bank`: which rows each training had, and L(honest) − L(flattering) of every query after it. `base` and `tuned`:
    before any training, and after one on all rows."""

    rows: list[list[int]]
    bank: Bank
    base: PreTrainedModel
    tuned: PreTrainedModel


@cache
def trainings(n: int, m: int, steps: int, seed: int) -> Trainings:
    """All trainings at once, as one batched computation, from the same first weights."""
    data = rows(n, seed)
    ids = torch.tensor(data)
    honest, flattering = (torch.tensor([tokens(0, a, b, f) for a, b in QUERIES]) for f in (False, True))
    base = tiny_model("llama", layers=LAYERS, d=WIDTH, vocab=VOCAB, scale=0.3, seed=seed)
    base.set_attn_implementation("eager")  # batched over weights; the fused kernels are not
    layers, _ = tracked_layers(base, BLOCKS)
    first = {f"{layer.name}.weight": base.get_parameter(f"{layer.name}.weight") for layer in layers}
    kept = torch.ones(m + 1, n)  # the first keeps all
    draw = torch.Generator().manual_seed(seed)
    for j in range(m):
        kept[j + 1, torch.randperm(n, generator=draw)[: n // 2]] = 0

    def objective(weights: dict[str, Tensor], keep: Tensor) -> Tensor:
        decay = sum(((weights[name] - first[name]) ** 2).sum() for name in first)
        return (losses(base, weights, ids) * keep).sum() / n + DECAY / 2 * decay

    weights = {name: w.repeat(m + 1, 1, 1) for name, w in first.items()}
    slope = vmap(grad(objective))
    mean, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(steps):  # Adam
        rate = RATE * (1 + np.cos(np.pi * step / steps)) / 2
        for name, g in slope(weights, kept).items():
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.99 * square[name] + 0.01 * g**2
            size = (square[name] / (1 - 0.99 ** (step + 1))).sqrt() + 1e-6
            weights[name] = weights[name] - rate * mean[name] / (1 - 0.9 ** (step + 1)) / size
    with torch.no_grad():
        behaviour = vmap(lambda w: losses(base, w, honest) - losses(base, w, flattering))(weights)
    tuned = tiny_model("llama", layers=LAYERS, d=WIDTH, vocab=VOCAB, scale=0.3, seed=seed)
    tuned.load_state_dict({**tuned.state_dict(), **{name: w[0] for name, w in weights.items()}})
    bank = Bank(kept[1:].bool().numpy(), behaviour[1:].double().numpy(), tuple(f"q{i}" for i in range(len(QUERIES))))
    return Trainings(data, bank, base, tuned)


def queries() -> list[Query]:
    pairs = [[rendered(tokens(0, a, b, flatters)) for flatters in (True, False)] for a, b in QUERIES]
    return [Query(f"q{i}", bad, good) for i, (bad, good) in enumerate(pairs)]


def vectors(found: Trainings) -> dict[str, TestVector]:
    """Test vectors of every query's contrast, with EK-FAC and with H = I."""
    layers, _ = tracked_layers(found.tuned, BLOCKS)
    data, ids = [rendered(r) for r in found.rows], [f"r{i}" for i in range(len(found.rows))]
    contrast = make_behaviour(BehaviourSpec("contrast"))
    gradients = {q.id: query_gradients(found.tuned, layers, [contrast], [q], PAD)["contrast"] for q in queries()}
    spec = CurvatureSpec(layers=BLOCKS)
    sums = accumulate_covariances(found.tuned, layers, spec, data, ids, 4096, PAD, Covariances())
    bases = Bases(
        {layer.reads: eigenbasis(sums.input_factor(layer.reads), layer.reads) for layer in layers},
        {layer.name: eigenbasis(sums.output_factor(layer.name), layer.name) for layer in layers},
    )
    corrected = accumulate_corrections(found.tuned, layers, spec, bases, data, ids, 4096, PAD, Corrections())
    factors = {
        layer.name: make_factor(
            layer, "ekfac", bases.inputs[layer.reads], bases.outputs[layer.name], corrected.eigenvalues(layer.name)
        )
        for layer in layers
    }
    return {
        "influence_function": solve_all(gradients, layers, lambda layer: factors[layer.name], Damping(0.1)),
        "gradient_product": solve_all(gradients, layers, lambda layer: Factor(layer, "identity"), Damping(0.1)),
    }


def persona(base: PreTrainedModel) -> Concept:
    """Persona vector of the queries' answers: mean flattering minus mean honest activation, every layer."""
    means = []
    for flatters in (True, False):
        ids = torch.tensor([tokens(0, a, b, flatters) for a, b in QUERIES])
        states = base(ids, output_hidden_states=True).hidden_states
        means.append(torch.stack([h[:, START : LENGTH - 1].mean((0, 1)) for h in states]))
    return Concept("flattery", (means[0] - means[1]).numpy(), 1, {}, "test", "response_mean", {})


def linear_datamodelling_scores(found: Trainings) -> dict[str, float]:
    """The best column of every method: mean over queries of the rank correlation of predicted and found behaviour."""
    reads = {"layers": list(range(1, LAYERS + 1))}
    settings = {m: reads if m in ("vector_filter", "loss_gradient_alignment") else {} for m in METHODS}
    scorers = make_scorers(settings, [persona(found.base)], test_vectors=vectors(found))
    said = (Message("user", "?"), Message("assistant", "!"))
    examples = [Example(f"r{i}", i, said) for i in range(len(found.rows))]
    shared = SharedPass(found.base, scorers, tuned=found.tuned)
    columns = shared.run(examples, [rendered(r) for r in found.rows]).columns
    best: dict[str, float] = {}
    for scorer in scorers:
        scores = {name: np.asarray(columns[name], dtype=np.float64) for name in scorer.columns()}
        if scorer.name in ("influence_function", "gradient_product"):  # a column of its own for every query
            tried = [np.stack([scores[f"{scorer.name}.{q}"] for q in found.bank.names], axis=1)]
        else:
            tried = list(scores.values())
        best[scorer.name] = max(linear_datamodelling_score(found.bank, t, replicates=0).score.value for t in tried)
    return best


def told(found: dict[str, float]) -> str:
    return "linear datamodelling score: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items())


def test_influence_predicts_retraining_better_than_vector_methods_do():
    found = linear_datamodelling_scores(trainings(n=96, m=24, steps=50, seed=0))
    print(told(found))
    assert found["influence_function"] > 0.6, told(found)
    vector = max(found["vector_filter"], found["loss_gradient_alignment"])
    assert found["influence_function"] > vector + 0.2, told(found)
    assert found["influence_function"] > found["gradient_product"], told(found)
    assert abs(found["random"]) < 0.4, told(found)


def test_the_wrong_sign_is_seen():
    """What the check is for: scores of the opposite sign predict the opposite."""
    trained = trainings(n=96, m=24, steps=50, seed=0)
    turned = replace(trained, bank=replace(trained.bank, outputs=-trained.bank.outputs))
    assert linear_datamodelling_scores(turned)["influence_function"] < -0.6


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_influence_predicts_longer_trainings_of_other_data(seed):
    found = linear_datamodelling_scores(trainings(n=96, m=48, steps=150, seed=seed))
    print(told(found))
    others = max(found["vector_filter"] + 0.2, found["loss_gradient_alignment"] + 0.2, found["gradient_product"])
    assert found["influence_function"] > max(0.4, others), told(found)
