"""LinearTap against autograd's weight gradients, in float64, through the whole model of Hugging Face."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from curate.errors import ConfigError, CurvatureError, ModelError
from curate.models.batching import collate
from curate.models.linear_tap import LinearTap
from curate.models.response_loss import summed_response_loss
from curate.models.tracked import LayerChoice, tracked_layers
from tests.tiny import KINDS, tiny_model

ROWS = [[5, 9, 17, 40, 41, 42, 43], [7, 8, 9], [100, 3, 101, 102, 103]]
STARTS, ENDS = [3, 0, 2], [7, 3, 4]


def per_row(model, layers, rows=ROWS, top=None, objective=None):
    """{layer: Σ_t δ_t a_tᵀ [batch, out, in]} of one padded batch."""
    ids, _ = collate(rows, 3)
    found = {}

    def keep(layer, a, delta):
        assert layer.name not in found
        found[layer.name] = torch.einsum("bto,bti->boi", delta, a)

    objective = objective or (lambda last: summed_response_loss(model, last, ids, STARTS, ENDS))
    value = LinearTap(model, layers, top).backward(ids, objective, keep)
    return value, found


def oracle(model, layers, loss_of):
    """{layer: weight gradient [out, in]} by autograd through every parameter of the model."""
    weights = [model.get_submodule(layer.name).weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        loss = loss_of(model)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    out = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        module = model.get_submodule(layer.name)
        gradient = torch.zeros_like(module.weight) if gradient is None else gradient
        out[layer.name] = gradient.T if isinstance(module, Conv1D) else gradient
    return loss.detach(), out


def row_loss(row, start, end):
    def loss(model):
        logits = model(input_ids=torch.tensor([row])).logits[0]
        first = max(start, 1)
        return torch.nn.functional.cross_entropy(
            logits[first - 1 : end - 1], torch.tensor(row[first:end]), reduction="sum"
        )

    return loss


def check(model, layers):
    value, got = per_row(model, layers)
    total = 0.0
    for i, (row, start, end) in enumerate(zip(ROWS, STARTS, ENDS, strict=True)):
        loss, want = oracle(model, layers, row_loss(row, start, end))
        total += float(loss)
        for layer in layers:
            # Norms and rotations of some families are float32 inside, whatever the model's precision.
            torch.testing.assert_close(got[layer.name][i], want[layer.name], rtol=1e-5, atol=1e-7)
    assert float(value) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_autograd_row_by_row(kind):
    model = tiny_model(kind).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    check(model, layers)


def test_adapter_matrices():
    wrapped = get_peft_model(tiny_model().double(), LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model = wrapped.get_base_model().double().eval().requires_grad_(False)
    layers, _ = tracked_layers(model, LayerChoice("adapter"))
    assert len(layers) == 3 * 3 * 2
    check(model, layers)


def test_an_objective_of_a_middle_layer():
    model = tiny_model("llama", layers=4).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    ran = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    v = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tap = LinearTap(model, layers, top=2)
    assert {layer.block for layer in tap.layers} == {0, 1}
    _, got = per_row(model, layers, top=2, objective=lambda h: (h[0, 2:5] @ v).square().sum())
    assert not ran  # nothing above the layer is computed
    handle.remove()

    def loss(model):
        states = model(input_ids=torch.tensor([ROWS[0]]), output_hidden_states=True).hidden_states[2]
        return (states[0, 2:5] @ v).square().sum()

    _, want = oracle(model, tap.layers, loss)
    assert sorted(got) == sorted(want)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name].sum(0), gradient, rtol=1e-6, atol=1e-9)
        assert not got[name][1:].any()  # other rows have none


def test_from_the_last_layer_to_the_first_and_not_below_the_lowest():
    model = tiny_model("llama", layers=4)
    layers, _ = tracked_layers(model, LayerChoice(first=1, last=3))
    ids, _ = collate(ROWS, 3)
    order, reached = [], []
    handle = model.model.layers[0].register_full_backward_hook(lambda *_: reached.append(0))
    LinearTap(model, layers).backward(
        ids,
        lambda last: summed_response_loss(model, last, ids, STARTS, ENDS),
        lambda layer, a, delta: order.append(layer.block),
    )
    handle.remove()
    assert order == [2] * 4 + [1] * 4
    assert not reached


def test_leaves_no_hooks_and_no_gradients_even_after_an_error():
    model = tiny_model("llama")
    layers, _ = tracked_layers(model, LayerChoice("all"))

    def fail(layer, a, delta):
        raise RuntimeError("stop")

    ids, _ = collate(ROWS, 3)
    tap = LinearTap(model, layers)
    with pytest.raises(RuntimeError, match="stop"):
        tap.backward(ids, lambda last: summed_response_loss(model, last, ids, STARTS, ENDS), fail)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_some_tokens_do_not_reach_is_named():
    model = tiny_model("llama")
    layers, _ = tracked_layers(model, LayerChoice("mlp"))
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0][:, :-1],))
    with pytest.raises(CurvatureError, match=r"'model\.layers\.1\.mlp\.gate_proj' was reached by 18 of the 21 tokens"):
        per_row(model, layers)
    assert not [m for m in model.modules() if m._forward_hooks]


def test_a_layer_above_the_behaviour_is_refused():
    model = tiny_model("llama")
    layers, _ = tracked_layers(model, LayerChoice(first=2))
    with pytest.raises(ConfigError, match="begin at block 2"):
        LinearTap(model, layers, top=2)


def test_weights_that_ask_for_gradients_are_refused():
    model = tiny_model("llama").requires_grad_(True)
    layers, _ = tracked_layers(model, LayerChoice())
    with pytest.raises(ModelError, match="requires_grad_"):
        LinearTap(model, layers)


def test_a_layer_that_is_not_there():
    model = tiny_model("llama")
    layers, _ = tracked_layers(model, LayerChoice())
    with pytest.raises(ModelError, match=r"0\.\.3"):
        LinearTap(model, layers, top=4)
