"""LayerTap against Hugging Face's own hidden states, and gradients against autograd over the whole model."""

from __future__ import annotations

import pytest
import torch

from curate.errors import ModelError
from curate.models.batching import collate
from curate.models.tap import LayerTap, check_layers, decoder_parts, head_logits, n_layers, width
from tests.tiny import KINDS, tiny_model

ROWS = [[5, 9, 17, 40, 41, 42, 43], [7, 8, 9], [100, 3, 101, 102, 103]]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny_model(request.param)


def test_equals_hidden_states(model):
    ids, mask = collate(ROWS, 3)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layers in ([0], [1], [3], [0, 1, 2, 3], [2, 1]):
        got = LayerTap(model, layers)(ids, mask)
        assert sorted(got) == sorted(layers)
        for layer in layers:
            real = mask.bool()
            torch.testing.assert_close(got[layer][real], want[layer][real], rtol=1e-6, atol=1e-6)


def test_head_logits_are_the_models(model):
    ids, mask = collate(ROWS, 3)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits[0]
        got = head_logits(model, LayerTap(model, [3])(ids, mask)[3][0])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layers", [[0], [1, 3], [0, 2, 3], [3]])
def test_gradients_equal_autograd(model, layers):
    ids, mask = collate(ROWS[:1], 3)
    targets = ids[0, 4:]

    def loss_fn(last):
        return torch.nn.functional.cross_entropy(head_logits(model, last[0, 3:-1]), targets, reduction="sum")

    hidden, got = LayerTap(model, [1]).grad_forward(ids, mask, layers, loss_fn)
    # Oracle: the whole model with gradients from the embeddings up, states kept by Hugging Face.
    grown = tiny_model(model.config.model_type if model.config.model_type in KINDS else "neox")
    grown.load_state_dict(model.state_dict())
    grown.get_input_embeddings().weight.requires_grad_(True)
    out = grown(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(out.logits[0, 3:-1], targets, reduction="sum")
    want = torch.autograd.grad(loss, [out.hidden_states[layer] for layer in layers])
    for layer, grad in zip(layers, want, strict=True):
        torch.testing.assert_close(got[layer], grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hidden[1], out.hidden_states[1].detach(), rtol=1e-6, atol=1e-6)


def test_stops_at_the_highest_layer():
    model = tiny_model("llama", layers=5)
    ran = []
    for i, block in enumerate(decoder_parts(model).blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    decoder_parts(model).head.register_forward_hook(lambda *_: ran.append("head"))
    ids, mask = collate(ROWS, 3)
    LayerTap(model, [1, 2])(ids, mask)
    assert ran == [0, 1]
    ran.clear()
    LayerTap(model, [5])(ids, mask)
    assert ran == [0, 1, 2, 3, 4]


def test_leaves_no_hooks_and_no_gradients():
    model = tiny_model("llama")
    ids, mask = collate(ROWS, 3)
    tap = LayerTap(model, [1, 2])
    state = tap(ids, mask)[2]
    assert not state.requires_grad
    with pytest.raises(ZeroDivisionError):
        tap.grad_forward(ids, mask, [1], lambda last: 1 / 0)
    assert not any(block._forward_pre_hooks for block in decoder_parts(model).blocks)
    tap.grad_forward(ids, mask, [1], lambda last: last.sum())
    assert all(p.grad is None for p in model.parameters())


def test_rows_do_not_depend_on_the_batch():
    model = tiny_model("llama")
    tap = LayerTap(model, [2])
    together = tap(*collate(ROWS, 3))[2]
    for i, row in enumerate(ROWS):
        alone = tap(*collate([row], 3))[2][0]
        torch.testing.assert_close(together[i, : len(row)], alone, rtol=1e-5, atol=1e-6)


def test_gradient_rows_are_their_own():
    model = tiny_model("gpt2")
    tap = LayerTap(model, [1])

    def run(rows):
        ids, mask = collate(rows, 3)

        def loss(last):
            logits = head_logits(model, last[:, :-1].flatten(0, 1)).log_softmax(-1)
            each = logits.gather(1, ids[:, 1:].flatten()[:, None])[:, 0].view(len(rows), -1)
            return -(each * mask[:, 1:]).sum()

        return tap.grad_forward(ids, mask, [1], loss)[1][1]

    together = run(ROWS)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(together[i, : len(row)], run([row])[0], rtol=1e-4, atol=1e-6)
        assert (together[i, len(row) :] == 0).all()


@pytest.mark.parametrize("layer", [-1, 4, 400])
def test_wrong_layer_names_the_range(layer):
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=rf"layer {layer} does not exist.*0\.\.3"):
        LayerTap(model, [1, layer])


def test_other_refusals():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="no layer"):
        check_layers(model, [])
    ids, mask = collate(ROWS, 3)
    model.requires_grad_(True)
    with pytest.raises(ModelError, match="require gradients"):
        LayerTap(model, [1]).grad_forward(ids, mask, [1], lambda last: last.sum())


def test_parts(model):
    embeddings, blocks, norm, head = decoder_parts(model)
    assert len(blocks) == n_layers(model) == 3
    assert width(model) == 32
    assert norm is not None
    assert "norm" in type(norm).__name__.lower()
    assert embeddings is model.get_input_embeddings()
    assert head is model.get_output_embeddings()
