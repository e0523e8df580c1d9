"""The shared pass against one-row-at-a-time loops with the whole model, autograd and finite differences."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from curate.errors import ConceptError, ConfigError, ModelError
from curate.models import response_loss
from curate.scoring import shared_pass
from curate.scoring.base import Batch, Needs, Scorer
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass
from tests.scoring.rows import make_concept, make_examples, render, render_own
from tests.tiny import tiny_model

KINDS = ["llama", "gpt2", "qwen2", "gemma2", "neox"]
ALL_LAYERS = [0, 1, 2, 3]
EXAMPLES = make_examples()
RENDERED = render(EXAMPLES)
OWN = render_own(EXAMPLES)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def unit(concept, layer):
    v = concept.vectors[layer].astype(np.float64)
    return v / np.linalg.norm(v)


def mean_activations(model, rows):
    """The usual loop: one row at a time, the whole model, all hidden states. [rows][layer] is a vector."""
    found = []
    for row in rows:
        with torch.no_grad():
            states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
        found.append([h[0, row.start : row.stop].double().mean(0).numpy() for h in states])
    return found


def loss_of(logits, row):
    """Mean cross-entropy of the response and its end of turn."""
    target = torch.tensor(row.input_ids[row.start : row.end])
    return F.cross_entropy(logits[0, row.start - 1 : row.end - 1], target)


def shifted_loss(model, row, layer, shift):
    """Loss with `shift` added to hidden_states[layer] at every response token, by a hook of this test's own."""
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)

    def before(module, args, kwargs):
        state = (args[0] if args else kwargs["hidden_states"]).clone()
        state[:, row.start : row.stop] += shift
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    handle = blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        loss = float(loss_of(model(torch.tensor([row.input_ids])).logits, row))
    handle.remove()
    return loss


def test_vector_filter_equals_the_usual_loop(model):
    one, two = make_concept("one"), make_concept("two", seed=1)
    scorers = make_scorers({"vector_filter": {"layers": ALL_LAYERS}}, [one, two])
    result = SharedPass(model, scorers, max_tokens=150).run(EXAMPLES, RENDERED)
    assert list(result.columns) == [f"vector_filter.{c}.L{k}" for c in ("one", "two") for k in ALL_LAYERS]
    means = mean_activations(model, RENDERED)
    for concept in (one, two):
        for layer in ALL_LAYERS:
            want = [a[layer] @ unit(concept, layer) for a in means]
            got = result.columns[f"vector_filter.{concept.name}.L{layer}"]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_projection_difference_equals_the_usual_loop(model):
    concept = make_concept()
    scorers = make_scorers({"projection_difference": {"layers": [1, 3]}}, [concept])
    generated = [None if i == 4 else r for i, r in enumerate(OWN)]
    result = SharedPass(model, scorers, max_tokens=200).run(EXAMPLES, RENDERED, generated)
    pairs = list(zip(mean_activations(model, RENDERED), mean_activations(model, OWN), strict=True))
    for layer in (1, 3):
        want = [(a[layer] - b[layer]) @ unit(concept, layer) for a, b in pairs]
        got = result.columns[f"projection_difference.trait.L{layer}"]
        assert np.flatnonzero(np.isnan(got)).tolist() == [4]
        np.testing.assert_allclose(np.delete(got, 4), np.delete(want, 4), rtol=1e-4, atol=1e-6)


def test_loss_gradient_alignment_equals_autograd(model):
    concept = make_concept()
    scorers = make_scorers({"loss_gradient_alignment": {"layers": ALL_LAYERS}}, [concept])
    result = SharedPass(model, scorers, max_tokens=150).run(EXAMPLES, RENDERED)
    for i, row in enumerate(RENDERED):
        embedded = model.get_input_embeddings()(torch.tensor([row.input_ids])).detach().requires_grad_(True)
        out = model(inputs_embeds=embedded, output_hidden_states=True)
        slopes = torch.autograd.grad(loss_of(out.logits, row), [out.hidden_states[k] for k in ALL_LAYERS])
        for layer, slope in zip(ALL_LAYERS, slopes, strict=True):
            want = -slope[0, row.start : row.stop].double().sum(0).numpy() @ unit(concept, layer)
            got = result.columns[f"loss_gradient_alignment.trait.L{layer}"][i]
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_loss_gradient_alignment_is_minus_the_derivative_of_the_loss(kind):
    """By its definition: how the loss changes as every response token is moved along the concept.

    Central differences of fourth order: norms compute in float32 even in a float64 model, so the step cannot be tiny.
    """
    model = tiny_model(kind)
    concept = make_concept()
    scorers = make_scorers({"loss_gradient_alignment": {"layers": [0, 1, 2]}}, [concept])
    got = SharedPass(model, scorers).run(EXAMPLES, RENDERED).columns
    exact = copy.deepcopy(model).double()
    for layer in (0, 1, 2):
        v, eps = torch.tensor(unit(concept, layer)), 5e-3
        for i in (0, 5):
            near, far = (
                shifted_loss(exact, RENDERED[i], layer, k * eps * v)
                - shifted_loss(exact, RENDERED[i], layer, -k * eps * v)
                for k in (1, 2)
            )
            want = -(8 * near - far) / (12 * eps)
            assert got[f"loss_gradient_alignment.trait.L{layer}"][i] == pytest.approx(want, rel=1e-3, abs=1e-5)


def everything(concept):
    return make_scorers(
        {
            "vector_filter": {"layers": [1, 2]},
            "projection_difference": {},
            "loss_gradient_alignment": {"layers": [2]},
            "activation_norm": {"layers": [3]},
            "response_length": {},
            "random": {"seed": 3},
            "bm25": {"queries": ["you are absolutely right, a good plan"]},
        },
        [concept],
    )


def test_scores_do_not_depend_on_batches_order_or_parts(model):
    scorers = everything(make_concept())
    whole = SharedPass(model, scorers, max_tokens=100_000).run(EXAMPLES, RENDERED, OWN).columns
    assert all(np.isfinite(values).all() for values in whole.values())
    for budget in (1, 90, 300):
        again = SharedPass(model, scorers, max_tokens=budget).run(EXAMPLES, RENDERED, OWN).columns
        for name, values in whole.items():
            np.testing.assert_allclose(again[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    order = np.random.default_rng(0).permutation(len(EXAMPLES))
    run = SharedPass(model, scorers, max_tokens=300)
    pieces = [
        run.run([EXAMPLES[i] for i in part], [RENDERED[i] for i in part], [OWN[i] for i in part]).columns
        for part in (order[:3], order[3:4], order[4:])
    ]
    for name, values in whole.items():
        got = np.concatenate([piece[name] for piece in pieces])
        np.testing.assert_allclose(got, values[order], rtol=1e-4, atol=1e-6, err_msg=name)


def test_windows_change_nothing(llama, monkeypatch):
    scorers = everything(make_concept())
    whole = SharedPass(llama, scorers).run(EXAMPLES, RENDERED, OWN)
    monkeypatch.setattr(shared_pass, "_WINDOW", 3)
    parts = SharedPass(llama, scorers).run(EXAMPLES, RENDERED, OWN)
    for name, values in whole.columns.items():
        np.testing.assert_allclose(parts.columns[name], values, rtol=1e-4, atol=1e-6)
    assert parts.stats.tokens == whole.stats.tokens
    assert parts.stats.flops == pytest.approx(whole.stats.flops)


def test_logits_in_small_chunks_change_nothing(llama, monkeypatch):
    scorers = make_scorers({"loss_gradient_alignment": {"layers": [1]}}, [make_concept()])
    whole = SharedPass(llama, scorers).run(EXAMPLES, RENDERED).columns
    monkeypatch.setattr(response_loss, "_LOGITS", 7 * llama.config.vocab_size)
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    again = SharedPass(llama, scorers).run(EXAMPLES, RENDERED).columns
    handle.remove()
    # Logits exist at the predicted tokens alone, at most seven at a time.
    assert max(seen) == 7
    assert sum(seen) == sum(r.end - r.start for r in RENDERED)
    for name, values in whole.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-5, atol=1e-7)


def test_one_forward_stops_at_the_highest_layer(llama):
    calls = {}
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
        for name, module in [*((f"block {i}", b) for i, b in enumerate(llama.model.layers)), ("head", llama.lm_head)]
    ]
    settings = {"vector_filter": {"layers": [1, 2]}, "activation_norm": {"layers": [1]}, "response_length": {}}
    concepts = [make_concept("one"), make_concept("two", seed=1)]
    SharedPass(llama, make_scorers(settings, concepts)).run(EXAMPLES, RENDERED)
    for handle in handles:
        handle.remove()
    assert calls == {"block 0": 1, "block 1": 1}


def test_the_backward_stops_at_the_lowest_layer(llama):
    touched = []
    handles = [
        block.register_full_backward_hook(lambda m, gi, go, i=i: touched.append(i))
        for i, block in enumerate(llama.model.layers)
    ]
    SharedPass(llama, make_scorers({"loss_gradient_alignment": {"layers": [2]}}, [make_concept()])).run(
        EXAMPLES, RENDERED
    )
    for handle in handles:
        handle.remove()
    assert set(touched) <= {2}
    assert all(p.grad is None for p in llama.parameters())


def test_no_model_where_none_is_needed():
    settings = {"random": {}, "response_length": None, "bm25": {"queries": ["good plan"]}}
    result = SharedPass(None, make_scorers(settings)).run(EXAMPLES, RENDERED)
    assert result.columns["response_length"].tolist() == [r.stop - r.start for r in RENDERED]
    assert result.stats.flops == 0
    assert result.stats.rows == len(EXAMPLES)


def test_bfloat16_is_near_float32(llama):
    concept = make_concept()
    settings = {"vector_filter": {}, "loss_gradient_alignment": {}}
    exact = SharedPass(llama, make_scorers(settings, [concept])).run(EXAMPLES, RENDERED).columns
    half = copy.deepcopy(llama).to(torch.bfloat16)
    rough = SharedPass(half, make_scorers(settings, [concept])).run(EXAMPLES, RENDERED).columns
    for name, values in exact.items():
        assert np.corrcoef(values, rough[name])[0, 1] > 0.99


def test_no_rows_and_no_generated_responses(llama):
    run = SharedPass(llama, everything(make_concept()))
    assert all(values.shape == (0,) for values in run.run([], [], []).columns.values())
    columns = run.run(EXAMPLES, RENDERED, [None] * len(EXAMPLES)).columns
    assert np.isnan(columns["projection_difference.trait.L2"]).all()
    assert np.isfinite(columns["vector_filter.trait.L1"]).all()


def test_statistics(llama):
    scorers = make_scorers({"vector_filter": {"layers": [2]}}, [make_concept()])
    stats = SharedPass(llama, scorers, max_tokens=1).run(EXAMPLES, RENDERED).stats
    assert stats.rows == stats.batches == len(EXAMPLES)
    assert stats.tokens == stats.padded_tokens == sum(r.stop for r in RENDERED)
    assert stats.seconds > 0
    assert stats.flops > 0
    scorers = make_scorers({"loss_gradient_alignment": {"layers": [2]}}, [make_concept()])
    stats = SharedPass(llama, scorers, max_tokens=10_000, gradient_tokens=1).run(EXAMPLES, RENDERED).stats
    assert stats.batches == len(EXAMPLES)


def test_refusals(llama):
    concept = make_concept()
    with pytest.raises(ConfigError, match="'vector_filter' needs a model"):
        SharedPass(None, make_scorers({"vector_filter": {}}, [concept]))
    with pytest.raises(ConfigError, match="token budget of a batch is 0"):
        SharedPass(llama, make_scorers({"random": {}}), max_tokens=0)
    with pytest.raises(ConfigError, match="token budget of a batch is -8"):
        SharedPass(llama, make_scorers({"random": {}}), gradient_tokens=-8)
    with pytest.raises(ConfigError, match="own responses; run the generate job first"):
        SharedPass(llama, make_scorers({"projection_difference": {}}, [concept])).run(EXAMPLES, RENDERED)
    with pytest.raises(ConfigError, match="need tokenised rows"):
        SharedPass(llama, make_scorers({"response_length": {}})).run(EXAMPLES)
    with pytest.raises(ValueError, match="7 tokenised rows for 8 examples"):
        SharedPass(llama, make_scorers({"response_length": {}})).run(EXAMPLES, RENDERED[1:])
    deep = make_concept(layers=9)
    with pytest.raises(ModelError, match=r"layer 7 .*0\.\.3"):
        SharedPass(llama, make_scorers({"vector_filter": {"layers": [7]}}, [deep]))
    with pytest.raises(ModelError, match=r"layer 7 .*0\.\.3"):
        SharedPass(llama, make_scorers({"loss_gradient_alignment": {"layers": [7]}}, [deep]))
    wide = make_concept(d=48)
    with pytest.raises(ConceptError, match="width 48, but the model's width is 32"):
        SharedPass(llama, make_scorers({"vector_filter": {}}, [wide])).run(EXAMPLES, RENDERED)


class Careless(Scorer):
    """A method with a mistake: what it returns is not what it promised."""

    name = "careless"

    def __init__(self, values):
        self.values = values

    def needs(self):
        return Needs()

    def columns(self):
        return ["careless"]

    def score(self, batch: Batch):
        return self.values

    def fingerprint(self):
        return {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"other": np.zeros(8)}, "returned the columns"),
        ({"careless": np.zeros(7)}, r"expected float64 \(8,\)"),
        ({"careless": np.zeros(8, dtype=np.float32)}, "float32"),
    ],
)
def test_a_careless_scorer_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        SharedPass(None, [Careless(values)]).run(EXAMPLES)
