"""Gradients of behaviours against autograd in float64 on formulas written out here, and against finite differences."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from curate.concepts.concept import Concept, direction
from curate.concepts.sae import SAE, Latent
from curate.corpus.render import Rendered
from curate.curvature.behaviour import BehaviourSpec, make_behaviour, query_gradients
from curate.curvature.queries import Query
from curate.errors import ConceptError, ConfigError, CurvatureError, ModelError
from curate.models.tracked import LayerChoice, tracked_layers, weight_of
from tests.tiny import tiny_model

D, LAYERS, PAD = 32, 3, 3
SPECS = [
    BehaviourSpec("loss"),
    BehaviourSpec("loss", whole=True),
    BehaviourSpec("contrast"),
    BehaviourSpec("contrast", whole=True),
    BehaviourSpec("concept", layer=2),
    BehaviourSpec("concept", layer=3),  # after the final norm
    BehaviourSpec("concept", layer=2, whole=True),
    BehaviourSpec("concept", "last_prompt_token", 2),
    BehaviourSpec("concept", "cosine", 2),
    BehaviourSpec("concept", "softmax", 2),
    BehaviourSpec("concept", "softmax", 2, temperature=0.2),
    BehaviourSpec("concept_contrast", layer=2),
    BehaviourSpec("concept_contrast", "softmax", 1),
    BehaviourSpec("concept_contrast", "cosine", 3, whole=True),
]


def rendered(seed: int, n: int, start: int, tail: int = 1) -> Rendered:
    ids = torch.randint(4, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Rendered(ids, start, n - 1 - tail, n - tail)


def concept(layer: int | None = 2, width: int = D, rows: int = LAYERS + 1) -> Concept:
    vectors = np.random.default_rng(5).normal(size=(rows, width))
    return Concept("kind", vectors, layer, {}, "random", "response_mean")


# Llama's norms work in float32 whatever the model's precision; GPT-2 is float64 throughout.
EXACT = {"llama": 1e-6, "qwen2": 1e-6, "gpt2": 1e-9}
QUERIES = [
    Query("a", rendered(0, 12, 5), rendered(1, 9, 5)),
    Query("b", rendered(2, 7, 3), rendered(3, 13, 3, tail=0)),
    Query("c", rendered(4, 10, 1), rendered(5, 10, 1)),
]


def written_out(model, spec: BehaviourSpec, query: Query, v: torch.Tensor | None, reduction: str) -> torch.Tensor:
    """f of one query, by the whole model without padding, from its logits and hidden states."""

    def loss(r: Rendered) -> torch.Tensor:
        logits = model(torch.tensor([r.input_ids])).logits[0]
        positions = range(1 if spec.whole else r.start, r.end)
        terms = [F.cross_entropy(logits[t - 1], torch.tensor(r.input_ids[t])) for t in positions]
        return sum(terms) / (len(terms) if reduction == "mean" else 1)

    def pooled(r: Rendered) -> torch.Tensor:
        h = model(torch.tensor([r.input_ids]), output_hidden_states=True).hidden_states[spec.layer][0]
        span = h[: r.stop] if spec.whole else h[r.start : r.stop]
        match spec.pooling:
            case "response_mean":
                return sum(v @ x for x in span) / len(span)
            case "last_prompt_token":
                return v @ h[r.start - 1]
            case "cosine":
                return v @ F.normalize(span.mean(0), dim=0)
            case _:
                e = torch.exp(span @ v / spec.temperature)
                return (e * (span @ v)).sum() / e.sum()

    match spec.kind:
        case "loss":
            return -loss(query.positive)
        case "contrast":
            return loss(query.negative) - loss(query.positive)
        case "concept":
            return pooled(query.positive)
    return pooled(query.positive) - pooled(query.negative)


def by_autograd(model, layers, spec, queries, v, reduction="mean") -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    weights = [model.get_submodule(layer.name).weight.requires_grad_(True) for layer in layers]
    f = sum(written_out(model, spec, q, v, reduction) for q in queries) / len(queries)
    found = torch.autograd.grad(f, weights, allow_unused=True)
    out = {}
    for layer, gradient in zip(layers, found, strict=True):
        if gradient is not None:
            conv = type(model.get_submodule(layer.name)).__name__ == "Conv1D"
            out[layer.name] = gradient.T if conv else gradient
    return out


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    live = {name for name, block in expected.items() if block.any()}
    assert live <= set(found)
    scale = max(float(block.abs().max()) for block in expected.values())
    for name, block in found.items():
        torch.testing.assert_close(block, expected.get(name, torch.zeros_like(block)), rtol=rtol, atol=rtol * scale)


def gradient_of(model, layers, spec, queries=QUERIES, reduction="mean"):
    c = concept() if spec.of_concept else None
    behaviour = make_behaviour(spec, c, reduction)
    v = None if c is None else torch.from_numpy(direction(c, spec.layer)).double()
    return query_gradients(model, layers, [behaviour], queries, PAD)[behaviour.name], v


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.pooling}-{s.layer}-{s.whole}-{s.temperature}")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_behaviour_is_the_gradient_of_its_formula(kind, spec):
    model = tiny_model(kind, LAYERS, D, scale=0.15).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    found, v = gradient_of(model, layers, spec)
    same(found, by_autograd(model, layers, spec, QUERIES, v), EXACT[kind])


@pytest.mark.parametrize("kind", ["loss", "contrast"])
def test_the_loss_follows_the_reduction(kind):
    model = tiny_model("qwen2", LAYERS, D).double()
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    found, _ = gradient_of(model, layers, BehaviourSpec(kind), reduction="sum")
    same(found, by_autograd(model, layers, BehaviourSpec(kind), QUERIES, None, "sum"), EXACT["qwen2"])
    assert not torch.allclose(found[layers[0].name], gradient_of(model, layers, BehaviourSpec(kind))[0][layers[0].name])


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[9], SPECS[13]], ids=lambda s: s.kind + s.pooling)
def test_finite_differences_agree(spec):
    model = tiny_model("gpt2", LAYERS, D, scale=0.15).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    found, v = gradient_of(model, layers, spec)
    torch.manual_seed(1)
    step = {name: torch.randn_like(block) for name, block in found.items()}
    values, eps = [], 1e-5
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        for name, direction_ in step.items():
            weight_of(moved.get_submodule(name)).add_(sign * eps * direction_)
        values.append(sum(float(written_out(moved, spec, q, v, "mean")) for q in QUERIES) / len(QUERIES))
    slope = sum(float((found[name] * direction_).sum()) for name, direction_ in step.items())
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(slope, rel=1e-6)


def test_the_mean_over_queries_is_that_of_single_gradients_for_several_behaviours_at_once():
    model = tiny_model("llama", LAYERS, D)
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    behaviours = [make_behaviour(s, concept() if s.of_concept else None) for s in (SPECS[0], SPECS[2], SPECS[4])]
    together = query_gradients(model, layers, behaviours, QUERIES, PAD)
    assert list(together) == ["loss", "contrast", "kind.L2"]
    for b in behaviours:
        alone = [query_gradients(model, layers, [b], [q], PAD)[b.name] for q in QUERIES]
        for name, block in together[b.name].items():
            assert block.dtype == torch.float32
            torch.testing.assert_close(block, torch.stack([g[name] for g in alone]).mean(0), rtol=1e-4, atol=1e-7)
    assert {layer.block for layer in layers if layer.name in together["kind.L2"]} == {0, 1}  # blocks below layer 2


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2], SPECS[4], SPECS[9]], ids=lambda s: s.kind + s.pooling)
def test_a_step_along_the_gradient_raises_the_behaviour(spec):
    model = tiny_model("llama", LAYERS, D, scale=0.15).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    found, v = gradient_of(model, layers, spec)
    before = sum(float(written_out(model, spec, q, v, "mean")) for q in QUERIES)
    for name, block in found.items():
        weight_of(model.get_submodule(name)).add_(1e-4 * block)
    assert sum(float(written_out(model, spec, q, v, "mean")) for q in QUERIES) > before


def test_bfloat16_weights_give_float32_gradients():
    model = tiny_model("llama", LAYERS, D)
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    exact, _ = gradient_of(model, layers, SPECS[4])
    rough, _ = gradient_of(model.bfloat16(), layers, SPECS[4])
    for name, block in rough.items():
        assert block.dtype == torch.float32
        assert F.cosine_similarity(block.flatten(), exact[name].flatten(), dim=0) > 0.99


def sae(activation: str, layer: int = 2) -> SAE:
    """A bias that lets every latent of interest fire here and there."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(12, D, generator=g, dtype=torch.float64)
    b = torch.full((12,), 0.5).double()
    form = {"topk": {"k": 6}, "relu": {}, "jumprelu": {"threshold": torch.full((12,), 0.4).double()}}[activation]
    return SAE(w, b, w.clone(), torch.zeros(D).double(), torch.zeros(D).double(), activation, layer, "tiny", **form)


def latent_by_autograd(model, layers, kind: str, of: SAE, index: int, whole: bool) -> dict[str, torch.Tensor]:
    """From the whole model's hidden states, one token and one latent at a time."""
    model = copy.deepcopy(model)
    weights = [model.get_submodule(layer.name).weight.requires_grad_(True) for layer in layers]

    def mean(r: Rendered) -> torch.Tensor:
        h = model(torch.tensor([r.input_ids]), output_hidden_states=True).hidden_states[of.layer][0]
        total = torch.zeros((), dtype=h.dtype)
        span = range(0 if whole else r.start, r.stop)
        for t in span:
            p = [of.w_enc[i] @ h[t] + of.b_enc[i] for i in range(of.latents)]
            chosen = sorted(range(of.latents), key=lambda i: -float(p[i]))[: of.k or of.latents]
            above = 0.0 if of.threshold is None else float(of.threshold[index])
            if index in chosen and float(p[index]) > above:
                total = total + p[index]
        return total / len(span)

    f = sum(mean(q.positive) - (mean(q.negative) if kind == "latent_contrast" else 0) for q in QUERIES) / len(QUERIES)
    found = torch.autograd.grad(f, weights, allow_unused=True)
    return {layer.name: g.T for layer, g in zip(layers, found, strict=True) if g is not None}


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("kind", ["latent", "latent_contrast"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_latents_activation_is_differentiated_through_its_encoder(activation, kind, whole):
    model = tiny_model("gpt2", LAYERS, D, scale=0.15).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    latent = Latent(sae(activation), 4)
    behaviour = make_behaviour(BehaviourSpec(kind, whole=whole), concept(), latent=latent)
    assert behaviour.name == f"kind.{kind}.L2" + (".whole" if whole else "")
    found = query_gradients(model, layers, [behaviour], QUERIES, PAD)[behaviour.name]
    same(found, latent_by_autograd(model, layers, kind, latent.sae, 4, whole), EXACT["gpt2"])


def test_a_latent_that_never_fires_has_no_gradient():
    model = tiny_model("llama", LAYERS, D)
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    silent = replace(sae("relu"), b_enc=torch.full((12,), -1e6).double())
    behaviour = make_behaviour(BehaviourSpec("latent"), concept(), latent=Latent(silent, 1))
    with pytest.raises(CurvatureError, match=r"is zero in all .* its latent is active on none of them"):
        query_gradients(model, layers, [behaviour], QUERIES, PAD)


def test_latent_behaviours_that_make_no_sense():
    with pytest.raises(ConfigError, match="it takes no pooling and no layer"):
        BehaviourSpec("latent", "cosine")
    with pytest.raises(ConfigError, match="it takes no pooling and no layer"):
        BehaviourSpec("latent_contrast", layer=2)
    with pytest.raises(ConfigError, match="'latent' needs a latent"):
        make_behaviour(BehaviourSpec("latent"), concept())
    with pytest.raises(ConfigError, match="'concept' has no latent"):
        make_behaviour(BehaviourSpec("concept"), concept(), latent=Latent(sae("relu"), 0))
    with pytest.raises(ConceptError, match="there is no latent 12"):
        Latent(sae("relu"), 12)
    model = tiny_model("llama", LAYERS, 16)
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    narrow = make_behaviour(BehaviourSpec("latent"), concept(), latent=Latent(sae("relu"), 0))
    with pytest.raises(ConceptError, match="has width 32, the model has 16"):
        query_gradients(model, layers, [narrow], QUERIES, PAD)
    alone = make_behaviour(BehaviourSpec("latent_contrast"), concept(), latent=Latent(sae("relu"), 0))
    with pytest.raises(CurvatureError, match="or choose the kind 'latent'"):
        query_gradients(tiny_model("llama", LAYERS, D), layers, [alone], [Query("a", QUERIES[0].positive, None)], PAD)


def test_names_tell_behaviours_apart():
    names = [make_behaviour(s, concept() if s.of_concept else None).name for s in SPECS]
    assert names[0] == "loss"
    assert names[4] == "kind.L2"
    assert names[8] == "kind.L2.cosine"
    assert names[11] == "kind.contrast.L2"
    assert len(set(names)) == len(names) - 1  # the two temperatures
    assert make_behaviour(BehaviourSpec("concept"), concept(layer=1)).name == "kind.L1"


def test_a_concept_below_the_tracked_blocks_is_refused_and_one_above_them_is_not():
    model = tiny_model("llama", LAYERS, D).double()
    upper, _ = tracked_layers(model, LayerChoice("attention", first=2))
    with pytest.raises(ConfigError, match=r"kind\.L2: the behaviour reads layer 2, .* block 2"):
        gradient_of(model, upper, BehaviourSpec("concept", layer=2))
    lower, _ = tracked_layers(model, LayerChoice("attention", last=1))
    found, v = gradient_of(model, lower, BehaviourSpec("concept", layer=3))
    same(found, by_autograd(model, lower, BehaviourSpec("concept", layer=3), QUERIES, v), EXACT["llama"])
    with pytest.raises(ConceptError, match="no direction at layer 9"):
        make_behaviour(BehaviourSpec("concept", layer=9), concept())
    deep = make_behaviour(BehaviourSpec("concept", layer=4), concept(rows=6))
    with pytest.raises(ModelError, match="layer 4 does not exist"):
        query_gradients(model, lower, [deep], QUERIES, PAD)


def test_a_concept_of_another_width_is_refused():
    model = tiny_model("llama", LAYERS, D)
    layers, _ = tracked_layers(model, LayerChoice())
    with pytest.raises(CurvatureError, match=r"'kind\.L2' has a direction of width 8, the model one of 32"):
        query_gradients(model, layers, [make_behaviour(SPECS[4], concept(width=8))], QUERIES, PAD)


@pytest.mark.parametrize("spec", [SPECS[2], SPECS[11]], ids=["contrast", "concept_contrast"])
def test_the_matrices_of_an_adapter_have_the_gradients_of_the_formula(spec):
    targets = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = inject_adapter_in_model(targets, tiny_model("gpt2", LAYERS, D, scale=0.15)).double().requires_grad_(False)
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.normal_(0, 0.3)
    layers, _ = tracked_layers(model, LayerChoice("adapter"))
    assert len(layers) == 4 * LAYERS
    found, v = gradient_of(model, layers, spec)
    same(found, by_autograd(model, layers, spec, QUERIES, v), EXACT["gpt2"])


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]], ids=["loss", "concept"])
def test_a_gradient_that_is_not_finite_names_the_query(spec):
    model = tiny_model("llama", LAYERS, D)
    layers, _ = tracked_layers(model, LayerChoice())
    model.get_input_embeddings().weight[QUERIES[1].positive.input_ids[4]] = float("inf")
    with pytest.raises(CurvatureError, match=r"at query 'b' is not finite .*float32"):
        gradient_of(model, layers, spec)


def test_a_gradient_of_zero_names_the_behaviour():
    # B of a fresh adapter is zero, so that A has no effect and no gradient; B has one.
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_model("llama", LAYERS, D))
    model.requires_grad_(False)
    both, _ = tracked_layers(model, LayerChoice("adapter"))
    found, _ = gradient_of(model, both, SPECS[2])
    assert {name for name, block in found.items() if block.any()} == {x.name for x in both if "lora_B" in x.name}
    dead, _ = tracked_layers(model, LayerChoice("adapter", pattern="lora_A"))
    with pytest.raises(CurvatureError, match="the gradient of 'contrast' is zero in all of the 3 tracked layers"):
        gradient_of(model, dead, SPECS[2])


def test_queries_that_do_not_suit_the_behaviour_are_named():
    model = tiny_model("llama", LAYERS, D)
    layers, _ = tracked_layers(model, LayerChoice())
    with pytest.raises(CurvatureError, match=r"query 'single' has no negative answer, .* kind 'concept'"):
        gradient_of(model, layers, SPECS[11], [*QUERIES, Query("single", rendered(0, 9, 3))])
    bare = Query("bare", rendered(0, 9, 0))
    with pytest.raises(CurvatureError, match="query 'bare' has no token before the response"):
        gradient_of(model, layers, SPECS[7], [bare])
    with pytest.raises(CurvatureError, match="query 'one' has no response token that the model predicts"):
        gradient_of(model, layers, SPECS[0], [Query("one", Rendered([5], 0, 1, 1))])
    with pytest.raises(CurvatureError, match="no query"):
        gradient_of(model, layers, SPECS[0], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "conecpt"}, "did you mean 'concept'"),
        ({"pooling": "mean"}, "pooling"),
        ({"kind": "loss", "layer": 3}, "no layer"),
        ({"kind": "contrast", "pooling": "cosine"}, "no pooling"),
        ({"pooling": "last_prompt_token", "whole": True}, "one token"),
        ({"pooling": "last_prompt_token", "kind": "concept_contrast"}, "the same for both answers"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BehaviourSpec(**settings)


def test_concepts_come_with_the_kinds_that_read_one():
    with pytest.raises(ConfigError, match="needs a concept"):
        make_behaviour(BehaviourSpec("concept"))
    with pytest.raises(ConfigError, match="'loss' has no concept"):
        make_behaviour(BehaviourSpec("loss"), concept())
    with pytest.raises(ConceptError, match="recommends no layer"):
        make_behaviour(BehaviourSpec("concept"), concept(layer=None))
    model = tiny_model("llama", LAYERS, D)
    twice = [make_behaviour(SPECS[0]), make_behaviour(SPECS[0])]
    with pytest.raises(ConfigError, match="one name"):
        query_gradients(model, tracked_layers(model, LayerChoice())[0], twice, QUERIES, PAD)
