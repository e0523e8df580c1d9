"""FLOPs against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig

from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.ekfac import Bases, Corrections, Eigenbasis, accumulate_corrections
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.flops import correction_flops, covariance_flops, fisher_flops
from curate.models.flops import forward_cost, forward_flops
from curate.models.load import ModelSpec
from curate.models.tap import LayerTap
from curate.models.tracked import LayerChoice, tracked_layers
from curate.scoring.directional.make import BACKENDS, make_backend
from curate.scoring.latent.make import BACKENDS as LATENT_BACKENDS
from curate.scoring.latent.make import make_latent_backend
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass
from curate.training.adapt import causal_lm, load_for_training
from curate.training.finetune import finetune
from curate.training.log import read_log, share_of_peak
from curate.training.spec import LoraSpec, TrainingSpec
from tests.flop_counter import Counter
from tests.scoring.directional.oracle import random_vector
from tests.scoring.latent.setting import random_sae, vector_above
from tests.scoring.rows import make_concept, make_examples, render
from tests.tiny import tiny_model
from tests.training.sample import dataset


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "neox"])
@pytest.mark.parametrize("layer", [0, 1, 3, None])
def test_forward_equals_the_counter(kind, layer):
    model = tiny_model(kind)
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel of the CPU
    ids = torch.randint(5, 300, (3, 50), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        if layer is None:
            with torch.no_grad():
                model(ids)
        else:
            LayerTap(model, [layer])(ids, torch.ones_like(ids))
    want = forward_flops(model.config, [50] * 3, layer, head_tokens=150 if layer is None else 0)
    # Rotary positions are a small product of their own.
    assert counter.get_total_flops() == pytest.approx(want, rel=0.01, abs=5000)


def test_gradient_pass_is_near_the_counter():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    examples = make_examples()[1:2]
    rows = render(examples)
    run = SharedPass(model, make_scorers({"loss_gradient_alignment": {"layers": [1]}}, [make_concept()]))
    with Counter() as counter:
        stats = run.run(examples, rows).stats
    assert stats.flops == pytest.approx(counter.total, rel=0.02)


def test_experts_count_by_how_many_are_visited():
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 4, "vocab_size": 100}
    costs = [
        forward_cost(MixtralConfig(**settings, num_local_experts=n, num_experts_per_tok=k)).block
        for n, k in ((4, 1), (4, 2), (8, 2))
    ]
    one_expert = 3 * 32 * 64
    assert costs[1] - costs[0] == pytest.approx(one_expert)
    assert costs[2] - costs[1] == pytest.approx(4 * 32)  # only the router grows


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_equals_the_counter(kind):
    model = tiny_model(kind)
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.generate(ids, min_new_tokens=9, max_new_tokens=9, do_sample=False, pad_token_id=0)
    want = forward_cost(model.config).generation_flops([20, 7], [9, 0])
    unread = forward_cost(model.config).generation_flops([7], [0])
    assert counter.get_total_flops() == pytest.approx(want - unread, rel=0.01)


@pytest.mark.parametrize("what", ["covariance", "correction", "diagonal"])
def test_a_fit_s_passes_are_near_the_counter(what):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    layers, _ = tracked_layers(model, LayerChoice("all"))
    spec = CurvatureSpec(fisher="empirical")
    examples = make_examples()[1:2]  # alone: counts are without padding
    rows, ids = render(examples), [e.id for e in examples]
    given = (spec, rows, ids, 4096, 0)
    passes, tokens = fisher_flops(forward_cost(model.config), layers, spec, rows)
    if what == "covariance":
        want = passes + covariance_flops(layers, tokens)
        with Counter() as counter:
            accumulate_covariances(model, layers, *given, Covariances())
    else:
        eye = {n: Eigenbasis(torch.eye(n), torch.ones(n)) for layer in layers for n in (layer.out, layer.width)}
        bases = Bases({x.reads: eye[x.width] for x in layers}, {x.name: eye[x.out] for x in layers})
        rotated = what == "correction"
        want = passes + correction_flops(layers, tokens, rotated)
        with Counter() as counter:
            accumulate_corrections(model, layers, spec, bases if rotated else None, *given[1:], Corrections())
    assert counter.total == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_is_near_the_counter(tiny, tmp_path, monkeypatch, method):
    def eager(*given):
        model = load_for_training(*given)
        causal_lm(model).set_attn_implementation("eager")
        return model

    monkeypatch.setattr("curate.training.finetune.load_for_training", eager)
    training = TrainingSpec(
        method=method, lora=LoraSpec(r=8), batch_size=4, micro_batch=4, epochs=2, dtype="float32", log_every=1
    )
    rows = [(list(range(5, 45)), 20, 40)] * 6  # of one length: the counter counts padding
    with Counter() as counter:
        done = finetune(
            training, ModelSpec(str(tiny), device="cpu"), dataset(rows, tmp_path), str(tmp_path / "t"), peak_tflops=0.5
        )
    # With an adapter, what goes into the first block needs no gradient.
    assert done["flops"] == pytest.approx(counter.total, rel=1e-6 if method == "full" else 0.02)
    lines = read_log(str(tmp_path / "t"))
    assert [line["flops"] for line in lines] == pytest.approx([done["flops"] * n / 12 for n in (4, 6, 10, 12)])
    assert done["peak"] == 0.5e12
    last = lines[-1]
    assert share_of_peak([last]) == {"peak": f"{last['flops'] / last['seconds'] / 0.5e12:.1%}"}
    assert share_of_peak([last, last]) == share_of_peak([last])
    assert share_of_peak([last, {**last, "peak": None}]) == {}
    assert share_of_peak([]) == {}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("backend", [*BACKENDS, "cosine"])
def test_directional_derivatives_are_near_the_counter(kind, backend, names, rank):
    model = tiny_model(kind)
    model.set_attn_implementation("eager")
    vector = random_vector(model, names, LayerChoice("all", first=1), rank=rank)
    run = make_backend(backend, model, vector, max_tokens=1)  # each row alone: counts are without padding
    with Counter() as counter:
        found = run.run([r for r in render(make_examples()) if r.stop > r.start])
    assert found.stats.flops == pytest.approx(counter.total, rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("backend", LATENT_BACKENDS)
def test_latent_influence_is_near_the_counter(kind, backend, names):
    model = tiny_model(kind)
    model.set_attn_implementation("eager")
    run = make_latent_backend(backend, model, random_sae(), vector_above(model, names), 1, 0, "mean")
    with Counter() as counter:
        run.run([r for r in render(make_examples()) if r.stop > r.start])
    assert run.stats.flops == pytest.approx(counter.total, rel=0.03)
