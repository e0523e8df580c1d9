"""Every backend against the gradients by the weights, written out by autograd in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from curate.corpus.render import Rendered
from curate.curvature.test_vector import Dense, TestVector
from curate.errors import ConfigError, CurvatureError, ModelError
from curate.models.tracked import LayerChoice
from curate.scoring.directional import dual_blocks, forward, tangents
from curate.scoring.directional.make import BACKENDS, make_backend
from tests.scoring.directional.oracle import exact, random_vector
from tests.scoring.rows import make_examples, render
from tests.tiny import KINDS, tiny_model

# Two rows of one token and of none before the response besides those of a chat.
ROWS = [*render(make_examples()), Rendered([5, 9, 11, 4], 0, 3, 4), Rendered([5, 9, 11, 4, 8, 8], 1, 2, 3)]
EXACT = [b for b in BACKENDS if b != "difference"]
NAMES = ["a", "b", "c"]


def close(found, expected, tolerance):
    """Largest difference as a share of the query's largest score."""
    assert np.isfinite(found).all()
    np.testing.assert_array_less(np.abs(found - expected).max(0), tolerance * np.abs(expected).max(0))


def tolerance(backend):
    """In float32, and in float64 models whose norms round to it. Models as small as these have small differences."""
    return 1e-2 if backend == "difference" else 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EXACT)
def test_equals_autograd_in_float64(kind, backend):
    model = tiny_model(kind)
    vector = random_vector(model, NAMES)
    found = make_backend(backend, model.double(), vector, max_tokens=300).run(ROWS)
    # Models with RMSNorm round to float32 in there.
    close(found.scores, exact(model, vector, ROWS)[0], 1e-9 if kind in ("gpt2", "neox", "opt", "falcon") else 1e-6)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("names", [["a"], NAMES])
def test_some_layers_sums_and_float32(backend, kind, names):
    model = tiny_model("llama")
    vector = random_vector(model, names, LayerChoice(kind=kind, first=1))
    found = make_backend(backend, model, vector, max_tokens=300, reduction="sum").run(ROWS)
    close(found.scores, exact(model, vector, ROWS, "sum")[0], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_differences_equal_autograd(kind):
    model = tiny_model(kind)
    vector = random_vector(model, NAMES[:1])
    found = make_backend("difference", model, vector, max_tokens=300).run(ROWS)
    close(found.scores, exact(model, vector, ROWS)[0], tolerance("difference"))


def adapted(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = get_peft_model(tiny_model("llama").to(dtype), settings)
    return wrapped.get_base_model().eval().requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_of_an_adapter(backend):
    model = adapted(torch.float32)
    vector = random_vector(model, NAMES[:2], LayerChoice(kind="adapter"))
    assert len(vector.layers) == 3 * 2 * 2
    found = make_backend(backend, model, vector).run(ROWS)
    close(found.scores, exact(model, vector, ROWS)[0], tolerance(backend))


@pytest.mark.parametrize("names", [NAMES[:1], NAMES])
@pytest.mark.parametrize("backend", EXACT)
def test_an_adapter_in_float32_within_a_model_in_bfloat16(backend, names):
    model = adapted(torch.bfloat16)
    vector = random_vector(model, names, LayerChoice(kind="adapter"))
    assert {model.get_submodule(layer.name).weight.dtype for layer in vector.layers} == {torch.float32}
    found, expected = make_backend(backend, model, vector).run(ROWS).scores, exact(model, vector, ROWS)[0]
    for q in range(len(names)):
        assert np.corrcoef(found[:, q], expected[:, q])[0, 1] > 0.99


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_differences_leave_the_weights_as_they_were(kind, error, monkeypatch):
    model = tiny_model(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    backend = make_backend("difference", model, random_vector(model, NAMES))
    if error:
        monkeypatch.setattr(backend, "_losses", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backend.run(ROWS)
    else:
        backend.run(ROWS)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_differences_refuse_half_precision():
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"needs float32 weights; the model is in torch\.bfloat16"):
        make_backend("difference", model, random_vector(model))


@pytest.mark.parametrize("window", [None, 10])
def test_tangents_in_small_pieces(window, monkeypatch):
    monkeypatch.setattr(tangents, "_QUERY_ROWS", 7)
    monkeypatch.setattr(tangents, "_SCORES_CPU", 100)
    monkeypatch.setattr(dual_blocks, "_ROWS_CPU", 40)
    monkeypatch.setattr(forward, "_QUERIES", 2)
    model = tiny_model("mistral")
    model.config.sliding_window = window
    model.set_attn_implementation("eager")  # not the kernel that reads the window from elsewhere
    vector = random_vector(model, NAMES, LayerChoice(kind="all", first=1))
    found = make_backend("forward", model, vector, max_tokens=300).run(ROWS)
    close(found.scores, exact(model, vector, ROWS)[0], 1e-4)
    unlike = make_backend("forward", tiny_model("mistral"), vector).run(ROWS)
    assert np.allclose(found.scores, unlike.scores, rtol=1e-3) == (window is None)


@pytest.mark.parametrize("backend", EXACT)
def test_low_rank_blocks(backend):
    model = tiny_model("qwen2")
    vector = random_vector(model, NAMES, rank=2)
    found = make_backend(backend, model.double(), vector).run(ROWS)
    close(found.scores, exact(model, vector, ROWS)[0], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_do_not_change_scores(backend):
    model = tiny_model("llama")
    vector = random_vector(model, ["a"])
    whole = make_backend(backend, model, vector).run(ROWS)
    single = make_backend(backend, model, vector, max_tokens=1).run(ROWS)
    assert (whole.stats.batches, single.stats.batches) == (1, len(ROWS))
    assert single.stats.tokens == single.stats.padded_tokens == sum(r.end for r in ROWS)
    close(whole.scores, single.scores, tolerance(backend))


def test_blocks_sum_to_the_score():
    model = tiny_model("llama")
    vector = random_vector(model, NAMES)
    found = make_backend("contraction", model.double(), vector, by_block=True).run(ROWS)
    expected = exact(model, vector, ROWS)[1]
    np.testing.assert_allclose(found.by_block, expected, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(found.by_block.sum(-1), found.scores, rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_sum_to_the_score(backend):
    model = tiny_model("llama").double()
    vector = random_vector(model, ["a", "b"])
    found = make_backend(backend, model, vector, per_token=True, max_tokens=300).run(ROWS)
    assert [t.shape for t in found.tokens] == [(len(r.input_ids), 2) for r in ROWS]
    for row, tokens, score in zip(ROWS, found.tokens, found.scores, strict=True):
        np.testing.assert_allclose(tokens.sum(0), score, rtol=1e-4, atol=1e-5)
        if backend != "contraction":  # a token's own loss: none outside the response
            assert not tokens[: max(row.start, 1)].any()
            assert not tokens[row.end :].any()


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1e-9), (torch.float16, 1e9)])
@pytest.mark.parametrize("names", [NAMES[:1], NAMES])
@pytest.mark.parametrize("backend", EXACT)
def test_half_precision_keeps_the_order_whatever_the_size_of_s(backend, names, dtype, size):
    model = tiny_model("llama")
    vector = random_vector(model, names)
    for block in vector.blocks.values():
        block.values.mul_(size)
    expected = exact(model, vector, ROWS)[0]
    found = make_backend(backend, copy.deepcopy(model).to(dtype), vector).run(ROWS).scores
    for q in range(len(names)):
        assert np.corrcoef(found[:, q], expected[:, q])[0, 1] > 0.99
        assert 0.9 < np.abs(found[:, q]).sum() / np.abs(expected[:, q]).sum() < 1.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_are_zero_are_left_out(backend):
    model = tiny_model("llama").double()
    vector = random_vector(model, ["a"])
    for layer in vector.layers:
        if layer.block != 1:
            vector.blocks[layer.name].values.zero_()
    made = make_backend(backend, model, vector)
    assert made.lowest == 1
    assert {layer.block for layer in made.layers} == {1}
    close(made.run(ROWS).scores, exact(model, vector, ROWS)[0], tolerance(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_cannot_be_scored_is_nan_and_its_neighbours_are_not(backend):
    model = tiny_model("llama").double()
    vector = random_vector(model, ["a"])
    nothing = Rendered([5, 6, 7], 0, 1, 1)  # the first token is not predicted
    found = make_backend(backend, model, vector).run([ROWS[0], nothing, ROWS[1]]).scores
    assert np.isnan(found[:, 0]).tolist() == [False, True, False]
    poisoned = max(set(range(300)) - {i for r in ROWS for i in r.input_ids})
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
    model.get_input_embeddings().weight.data[poisoned] = float("inf")
    bad = Rendered([5, 6, poisoned, 7, 8], 2, 4, 5)
    found = make_backend(backend, model, vector).run([*ROWS, bad]).scores
    assert np.isnan(found[-1]).all()
    close(found[:-1], exact(model, vector, ROWS)[0], tolerance(backend))
    assert make_backend(backend, model, vector).run([]).scores.shape == (0, 1)


def test_refusals():
    model = tiny_model("llama")
    vector = random_vector(model, ["a"])
    with pytest.raises(ConfigError, match="no backend 'contracion'; did you mean 'contraction'"):
        make_backend("contracion", model, vector)
    with pytest.raises(ConfigError, match="token budget of a batch is 0"):
        make_backend("contraction", model, vector, max_tokens=0)
    with pytest.raises(ConfigError, match="reduction of the loss is 'max'"):
        make_backend("contraction", model, vector, reduction="max")
    with pytest.raises(CurvatureError, match=r"'model\.layers\.0\.self_attn\.q_proj', which GPT2LMHeadModel has not"):
        make_backend("contraction", tiny_model("gpt2"), vector)
    with pytest.raises(CurvatureError, match=r"shape \(32, 32\).*whose weight here is \(48, 48\)"):
        make_backend("contraction", tiny_model("llama", d=48), vector)
    with pytest.raises(ModelError, match="require gradients"):
        make_backend("contraction", copy.deepcopy(model).requires_grad_(True), vector)
    for backend in BACKENDS:
        if backend != "contraction":
            with pytest.raises(ConfigError, match="does not split scores by block"):
                make_backend(backend, model, vector, by_block=True)
    assert isinstance(vector, TestVector)
    assert all(isinstance(block, Dense) for block in vector.blocks.values())


@pytest.mark.parametrize("kind", KINDS)
def test_which_models_have_tangents_by_hand(kind):
    assert dual_blocks.supported(tiny_model(kind)) == (kind in ("llama", "qwen2", "qwen3", "mistral"))
