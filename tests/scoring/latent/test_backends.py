"""Every backend against dense double backward and the JVP sweep, in float64; the path integral; refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.concepts.sae import decode, encode
from curate.corpus.render import Rendered
from curate.curvature import output_hessian
from curate.curvature.test_vector import Dense, TestVector
from curate.errors import BadRow, ConceptError, ConfigError, CurvatureError, ModelError
from curate.scoring.latent import reverse_over_forward
from curate.scoring.latent.base import RowLatents
from curate.scoring.latent.make import BACKENDS, make_latent_backend
from tests.scoring.directional.oracle import random_vector
from tests.scoring.latent.jvp_sweep import jvp_sweep
from tests.scoring.latent.path_integral import contributions
from tests.scoring.latent.setting import (
    ROWS,
    adapted,
    dense_latents,
    densified,
    exact_model,
    expected,
    projection,
    random_sae,
    vector_above,
)
from tests.tiny import KINDS, tiny_model

EXACT = [name for name in BACKENDS if name != "difference"]


def made(name, model, sae, vector, **settings):
    backend = make_latent_backend(name, model, sae, vector, **settings)
    if name == "difference" and model.dtype == torch.float64:
        backend.steps = [step / 25 for step in backend.steps]  # these models do not round to float32 in their norms
    return backend


def check(found, model, sae, vector, rows, tolerance=1e-8, reduction="mean", sign=1.0):
    """Each query's influence on each row, as a share of its largest one."""
    for one, row in zip(found, rows, strict=True):
        assert isinstance(one, RowLatents)
        want = sign * expected(model, sae, row, vector, reduction).numpy()
        activations, influence = densified(one, sae.latents)
        np.testing.assert_allclose(activations, dense_latents(model, sae, row).numpy(), rtol=1e-9, atol=1e-9)
        largest = np.abs(want).max((1, 2), keepdims=True)
        assert (largest > 0).all()
        assert np.abs(influence - want).max() <= tolerance * largest.min()
        assert not influence[:, activations == 0].any()


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_double_backward_on_dense_activations(backend, kind, activation):
    model, sae = exact_model(kind), random_sae(activation)
    vector = vector_above(model)
    check(made(backend, model, sae, vector).run(ROWS), model, sae, vector, ROWS)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_the_jvp_sweep(kind):
    model, sae, row = exact_model(kind), random_sae(), ROWS[1]
    vector = vector_above(model, ["a"])
    want = jvp_sweep(model, sae, row, vector, 0).numpy()
    for backend in BACKENDS:
        (found,) = made(backend, model, sae, vector).run([row])
        assert_close(densified(found, sae.latents)[1][0], want, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EXACT)
def test_every_architecture(backend, kind):
    model, sae = exact_model(kind), random_sae()
    vector = vector_above(model, ["a"])
    # Some families round to float32 on the way whatever the precision.
    rounds = kind not in ("llama", "qwen2", "qwen3", "mistral", "gpt2", "neox", "opt", "falcon", "phi")
    check(made(backend, model, sae, vector).run(ROWS[:2]), model, sae, vector, ROWS[:2], 1e-5 if rounds else 1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_of_an_adapter(backend):
    model, sae = adapted(exact_model()), random_sae()
    vector = vector_above(model, kind="adapter")
    assert all("lora" in layer.name for layer in vector.layers)
    check(made(backend, model, sae, vector).run(ROWS), model, sae, vector, ROWS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_low_rank_scale_and_the_papers_sign(backend):
    model, sae = exact_model(), random_sae("relu", scale=0.7)
    vector = vector_above(model, kind="attention", rank=2)
    found = made(backend, model, sae, vector, reduction="sum", sign="paper").run(ROWS)
    check(found, model, sae, vector, ROWS, reduction="sum", sign=-1.0)


@pytest.mark.parametrize("settings", [{}, {"scale": 0.3}, {"normalise": "layer_norm"}, {"normalise": "constant_norm"}])
def test_the_way_from_states_to_latents_is_the_decoders(settings):
    sae = random_sae("topk", **settings)
    backend = made("auto", exact_model(), sae, vector_above(exact_model()))
    maker = torch.Generator().manual_seed(0)
    x, slope = torch.randn((2, 7, 32), generator=maker, dtype=torch.float64)
    sparse = encode(sae, x)
    values = sparse.values.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(decode(sae, replace(sparse, values=values)), values, slope)
    torch.testing.assert_close(backend._at_latents(sparse, slope), want * sparse.values)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layers(backend, layer):
    model, sae = exact_model(), random_sae(layer=layer)
    vector = vector_above(model, ["a"], layer=layer)
    check(made(backend, model, sae, vector).run(ROWS), model, sae, vector, ROWS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_vectors_some_queries_and_small_groups(backend, monkeypatch):
    monkeypatch.setattr(reverse_over_forward, "_QUERIES", 2)
    for module in (reverse_over_forward, output_hessian):
        monkeypatch.setattr(module, "_LOGITS", 320 * 6)  # chunks of few positions
    model, sae = exact_model(), random_sae()
    one, other = vector_above(model, ["a", "b"]), vector_above(model, ["c"], kind="mlp", seed=1)
    both = made(backend, model, sae, [one, other])
    assert both.names == ("a", "b", "c")
    whole, some = both.run(ROWS), both.run(ROWS, queries=[2, 0])
    first, second = made(backend, model, sae, one).run(ROWS), made(backend, model, sae, other).run(ROWS)
    for all_, part, a, b in zip(whole, some, first, second, strict=True):
        assert_close(all_.influence, np.concatenate([a.influence, b.influence]), 1e-8)
        assert_close(part.influence, all_.influence[[2, 0]], 1e-8)
    assert [found.influence.shape[0] for found in both.run(ROWS, queries=[])] == [0] * len(ROWS)


def assert_close(found, want, tolerance):
    assert found.shape == want.shape
    assert np.abs(found - want).max(initial=0) <= tolerance * np.abs(want).max(initial=0)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_padding_change_nothing(backend, activation):
    model, sae = exact_model(), random_sae(activation)
    backend_ = made(backend, model, sae, vector_above(model))
    whole = backend_.run(ROWS)
    assert backend_.stats.batches == 1
    assert backend_.stats.padded_tokens == 10 * len(ROWS) > backend_.stats.tokens == 10 + 6 + 4 + 3
    single = made(backend, model, sae, vector_above(model), token_budget=1)
    other_pad = made(backend, model, sae, vector_above(model), pad_id=77)
    for rows, take in ((single.run(ROWS), list), (other_pad.run(ROWS), list), (backend_.run(ROWS[::-1]), reversed)):
        for found, want in zip(take(rows), whole, strict=True):
            # ReLU and JumpReLU: what the fullest token of a neighbour needs does not show.
            assert found.indices.shape == want.indices.shape
            assert found.influence.shape == want.influence.shape
            for a, b in zip(densified(found, sae.latents), densified(want, sae.latents), strict=True):
                assert_close(a, b, 1e-8)
    assert single.stats.batches == len(ROWS)


def test_shapes_types_and_slots_without_a_latent():
    model = tiny_model("llama")
    sae = random_sae("topk", k=12).to(dtype=torch.float32)  # more than are positive
    for backend in BACKENDS:
        for row, found in zip(ROWS, made(backend, model, sae, vector_above(model)).run(ROWS), strict=True):
            assert found.indices.dtype == np.int32
            assert found.activations.dtype == found.influence.dtype == np.float32
            t, k = found.indices.shape
            assert (found.activations.shape, found.influence.shape) == ((t, k), (2, t, k))
            assert t == row.end
            assert k <= 12
            empty = found.activations == 0
            assert empty.any()
            assert not found.indices[empty].any()
            assert not found.influence[:, empty].any()
            assert not found.influence[:, -1].any()  # nothing is predicted from the last token
            assert found.influence[:, 0].any()  # but the prompt is read


def test_a_row_on_which_no_latent_fires():
    model, sae = exact_model(), random_sae("relu")
    silent = replace(sae, b_enc=torch.full_like(sae.b_enc, -1e6))
    (found,) = made("auto", model, silent, vector_above(model)).run(ROWS[:1])
    assert found.indices.shape == (10, 0)
    assert found.influence.shape == (2, 10, 0)


@pytest.mark.parametrize("kind", ["attention", "adapter"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [*((name, torch.float32, 1e-4) for name in EXACT), ("difference", torch.float32, 5e-2),
     *((name, torch.bfloat16, 0.3) for name in EXACT)],
)  # fmt: skip
def test_lower_precision(backend, dtype, tolerance, kind):
    model, sae = adapted(tiny_model("llama")), random_sae().to(dtype=torch.float32)
    vector = vector_above(model, kind=kind)
    exact = made("double_backward", copy.deepcopy(model).double(), sae.to(dtype=torch.float64), vector).run(ROWS)
    lower = copy.deepcopy(model).to(dtype)
    for name, module in lower.named_modules():
        if "lora" in name and hasattr(module, "weight"):
            module.float()  # as adapters are, in a model of half precision too
    for a, b in zip(made(backend, lower, sae, vector).run(ROWS), exact, strict=True):
        a, b = densified(a, sae.latents)[1], densified(b, sae.latents)[1]
        for q in range(2):
            assert np.abs(a[q] - b[q]).max() < tolerance * np.abs(b[q]).max()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_path_integral_is_complete_and_the_influence_is_its_end(kind):
    model, sae, row = exact_model(kind), random_sae("relu"), ROWS[1]
    vector = vector_above(model, ["a"])
    r = dense_latents(model, sae, row)
    parts = contributions(model, sae, row, vector, 0)
    whole, none = (float(projection(model, sae, row, share * r, vector, 0).detach()) for share in (1, 0))
    assert float(parts.sum()) == pytest.approx(whole - none, rel=1e-9)
    assert not parts[r == 0].any()
    # Along the path from r(1-ε) to r the influence (ours: minus) is what each latent adds, to first order.
    (found,) = made("auto", model, sae, vector).run([row])
    step = 1e-6
    before = float(projection(model, sae, row, (1 - step) * r, vector, 0).detach())
    assert -found.influence.sum() == pytest.approx((whole - before) / step, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_cannot_be_scored_come_back_as_such(backend):
    model, sae = exact_model(), random_sae()
    vector = vector_above(model)
    nothing = Rendered([5, 6, 7], 0, 1, 1)  # the first token is not predicted
    weight = model.get_input_embeddings().weight
    model.get_input_embeddings().weight.data = weight.data.clone()
    model.get_input_embeddings().weight.data[200] = float("nan")
    poisoned = Rendered([5, 6, 200, 7, 8], 2, 4, 5)
    found = made(backend, model, sae, vector).run([ROWS[0], nothing, poisoned, *ROWS[1:]])
    assert isinstance(found[1], BadRow)
    assert "no response token" in found[1].reason
    assert isinstance(found[2], BadRow)
    assert "not finite" in found[2].reason
    check([found[0], *found[3:]], model, sae, vector, ROWS)
    assert made(backend, model, sae, vector).run([]) == []


def test_a_slope_that_is_not_finite_is_a_bad_row():
    model, sae = tiny_model("llama"), random_sae().to(dtype=torch.float32)
    vector = vector_above(model, ["a"])
    for block in vector.blocks.values():
        block.values.mul_(1e37)
    (found,) = make_latent_backend("auto", model, sae, vector).run(ROWS[:1])
    assert isinstance(found, BadRow)
    assert "influence" in found.reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_is_left_as_it_was(backend):
    model = tiny_model("gpt2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made(backend, model, random_sae().to(dtype=torch.float32), vector_above(model)).run(ROWS)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_refusals():
    model, sae = tiny_model("llama"), random_sae().to(dtype=torch.float32)
    vector = vector_above(model)
    with pytest.raises(ConfigError, match="no latent backend 'double_bakward'; did you mean 'double_backward'"):
        make_latent_backend("double_bakward", model, sae, vector)
    with pytest.raises(ConfigError, match="token budget of a batch is 0"):
        make_latent_backend("auto", model, sae, vector, token_budget=0)
    with pytest.raises(ConfigError, match="reduction of the loss is 'max'"):
        make_latent_backend("auto", model, sae, vector, reduction="max")
    with pytest.raises(ConfigError, match="sign is 'theirs'"):
        make_latent_backend("auto", model, sae, vector, sign="theirs")
    with pytest.raises(ModelError, match="require gradients"):
        make_latent_backend("auto", copy.deepcopy(model).requires_grad_(True), sae, vector)
    with pytest.raises(ConfigError, match=r"needs float32 weights; the model is in torch\.bfloat16"):
        make_latent_backend("difference", copy.deepcopy(model).bfloat16(), sae, vector)


def test_an_sae_that_does_not_fit():
    model = tiny_model("llama")
    with pytest.raises(ConceptError, match=r"'tiny' has width 48.*32"):
        make_latent_backend("auto", model, random_sae(d=48), vector_above(model))
    for layer in (3, 7):
        with pytest.raises(ConceptError, match=rf"'tiny' is of layer {layer}.*blocks 0 to 2"):
            make_latent_backend("auto", model, random_sae(layer=layer), vector_above(model))
    sae = random_sae()
    with pytest.raises(ConceptError, match="w_dec holds NaN"):
        replace(sae, w_dec=sae.w_dec * float("nan"))


def test_a_test_vector_that_does_not_fit():
    model, sae = tiny_model("llama"), random_sae().to(dtype=torch.float32)
    with pytest.raises(CurvatureError, match=r"7 of 21 layers below the SAE 'tiny'.*block 0.*first=1"):
        make_latent_backend("auto", model, sae, random_vector(model))
    with pytest.raises(CurvatureError, match="which GPT2LMHeadModel has not"):
        make_latent_backend("auto", tiny_model("gpt2"), sae, vector_above(model))
    vector = vector_above(model)
    for factor, words in ((0.0, "'b' is zero"), (float("nan"), "'b' is not finite")):
        blocks = {name: block.values.clone() for name, block in vector.blocks.items()}
        for values in blocks.values():
            values[1] *= factor
        bad = TestVector(vector.names, vector.layers, {name: Dense(v) for name, v in blocks.items()})
        with pytest.raises(CurvatureError, match=words):
            make_latent_backend("auto", model, sae, bad)
