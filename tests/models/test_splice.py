"""Inline SAEs and the upper part of a model, in every family of the tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from curate.concepts.sae import SAE, Sparse, encode, keep, reconstruct
from curate.errors import ConceptError, ModelError
from curate.models.splice import downstream, spliced
from curate.models.tap import LayerTap, decoder_parts, head_logits
from tests.tiny import KINDS, tiny_model

LAYERS, D = 3, 32


def identity_sae(layer: int, d: int = D) -> SAE:
    """x̃ = x: a latent for each axis and sign."""
    eye = torch.eye(d)
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(d)
    return SAE(both, torch.zeros(2 * d), both, zeros, zeros, "relu", layer, "identity")


def small_sae(layer: int, seed: int = 0, d: int = D, h: int = 48) -> SAE:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(h, d, generator=g) / d**0.5
    b = 0.1 * torch.randn(d, generator=g)
    return SAE(w, torch.zeros(h), w.clone(), b, b, "topk", layer, "small", k=6)


def ids(batch: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(4, 300, (batch, tokens), generator=torch.Generator().manual_seed(5))


def states(model: PreTrainedModel, tokens: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(tokens, output_hidden_states=True, use_cache=False, **kwargs).hidden_states


@pytest.mark.parametrize("kind", KINDS)
def test_the_upper_part_of_a_model_is_the_model(kind: str) -> None:
    model, tokens = tiny_model(kind), ids()
    found = states(model, tokens)
    for layer in range(LAYERS + 1):
        with torch.no_grad():
            last = downstream(model, layer, found[layer])
        torch.testing.assert_close(last, found[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_below_are_not_run_and_are_there_again(kind: str) -> None:
    model, tokens = tiny_model(kind), ids()
    blocks = list(decoder_parts(model).blocks)
    x = states(model, tokens)[2]
    run: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: run.append(i)) for i, b in enumerate(blocks)]
    downstream(model, 2, x)
    assert run == [2]
    for handle in handles:
        handle.remove()
    assert all(one is other for one, other in zip(decoder_parts(model).blocks, blocks, strict=True))


class Upper(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return downstream(self.model, 2, x)


def test_weights_that_are_swapped_for_a_call_are_seen() -> None:
    model, name = tiny_model("llama").double(), "model.layers.2.mlp.down_proj.weight"
    x = states(model, ids())[2]
    draw = torch.Generator().manual_seed(4)
    step = torch.randn(model.get_submodule(name.rpartition(".")[0]).weight.shape, generator=draw, dtype=torch.float64)

    def f(e: Tensor) -> Tensor:
        moved = {f"model.{name}": model.get_parameter(name) + e * step}
        return torch.func.functional_call(Upper(model), moved, (x,)).sum()

    with sdpa_kernel(SDPBackend.MATH):
        value, slope = torch.func.jvp(f, (torch.zeros(()).double(),), (torch.ones(()).double(),))
    torch.testing.assert_close(value, downstream(model, 2, x).sum())
    e = torch.zeros((), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(slope, torch.autograd.grad(f(e), e)[0])
    with torch.no_grad():
        model.get_parameter(name).add_(1e-2 * step)
    torch.testing.assert_close(downstream(model, 2, x).sum(), f(torch.zeros(()).double()))
    assert not torch.isclose(downstream(model, 2, x).sum(), value)


def test_the_blocks_come_back_after_an_error() -> None:
    model = tiny_model()
    blocks = list(decoder_parts(model).blocks)
    with pytest.raises(RuntimeError):
        downstream(model, 2, torch.zeros(1, 4, D + 1))
    assert all(one is other for one, other in zip(decoder_parts(model).blocks, blocks, strict=True))
    torch.testing.assert_close(states(model, ids())[-1], states(tiny_model(), ids())[-1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_mask_for_padding_on_the_left(kind: str) -> None:
    model, tokens = tiny_model(kind), ids()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    found = states(model, tokens, attention_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(downstream(model, 1, found[1], mask)[mask > 0], found[-1][mask > 0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_to_the_state_are_those_of_the_whole_forward(kind: str) -> None:
    model, tokens = tiny_model(kind), ids()
    x = states(model, tokens)[1].requires_grad_(True)
    weights = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1))
    _, expected = LayerTap(model, [1]).grad_forward(tokens, None, [1], lambda last: (last * weights).sum())
    (found,) = torch.autograd.grad((downstream(model, 1, x) * weights).sum(), x)
    torch.testing.assert_close(found, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_and_forward_mode(kind: str) -> None:
    model, tokens = tiny_model(kind).double(), ids(1, 5)
    x = states(model, tokens)[1].requires_grad_(True)
    g = torch.Generator().manual_seed(2)
    weights, v = (torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(2))

    def f(x: Tensor) -> Tensor:
        return (downstream(model, 1, x) * weights).sum()

    with sdpa_kernel(SDPBackend.MATH):
        (slope,) = torch.autograd.grad(f(x), x, create_graph=True)
        (twice,) = torch.autograd.grad((slope * v).sum(), x)
        with torch.no_grad(), fwAD.dual_level():
            tangent = fwAD.unpack_dual(f(fwAD.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, (slope * v).sum(), rtol=1e-5, atol=1e-5)
    # Some families' norms compute in float32 whatever the model's precision; OPT has the kinks of ReLU.
    eps = 1e-6 if kind == "opt" else 3e-3
    (up,), (down,) = (torch.autograd.grad(f(x + s * eps * v), x) for s in (1, -1))
    error = (twice - (up - down) / (2 * eps)).norm() / twice.norm()
    assert error < 1e-2, float(error)


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_that_is_the_identity_changes_nothing(kind: str) -> None:
    model, tokens = tiny_model(kind), ids()
    expected = model(tokens).logits
    for layer in range(LAYERS + 1):
        with spliced(model, identity_sae(layer)):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_the_state_of_the_layer_is_the_reconstruction(kind: str, layer: int) -> None:
    model, tokens, sae = tiny_model(kind), ids(), small_sae(layer)
    x = states(model, tokens)[layer]
    out = reconstruct(sae, x.flatten(0, 1)).view_as(x)
    with torch.no_grad():
        expected = head_logits(model, downstream(model, layer, out))
        with spliced(model, sae):
            torch.testing.assert_close(model(tokens).logits, expected)
            torch.testing.assert_close(LayerTap(model, [layer])(tokens)[layer], out)
            # What is given to the upper part is what the block reads: the SAE is not applied to it again.
            torch.testing.assert_close(head_logits(model, downstream(model, layer, out)), expected)
        assert not torch.allclose(model(tokens).logits, expected)


def test_an_edit_masks_latents() -> None:
    model, tokens, sae = tiny_model(), ids(), small_sae(2)
    chosen = torch.arange(sae.latents) % 2 == 0
    seen: list[Sparse] = []

    def edit(sparse: Sparse) -> Sparse:
        seen.append(sparse)
        return keep(sparse, chosen)

    x = states(model, tokens)[2]
    masked = replace(sae, w_dec=torch.where(chosen[:, None], sae.w_dec, 0.0))
    with torch.no_grad():
        expected = head_logits(model, downstream(model, 2, reconstruct(masked, x.flatten(0, 1)).view_as(x)))
        with spliced(model, sae, edit):
            torch.testing.assert_close(model(tokens).logits, expected)
    torch.testing.assert_close(seen[0].values, encode(sae, x.flatten(0, 1)).values)


def test_two_saes_at_two_layers() -> None:
    model, tokens = tiny_model(), ids()
    low, high = small_sae(1), small_sae(2, seed=1)
    lower = reconstruct(low, states(model, tokens)[1].flatten(0, 1)).view(2, 7, D)
    with torch.no_grad():
        with spliced(model, low):
            x = LayerTap(model, [2])(tokens)[2]
        expected = downstream(model, 2, reconstruct(high, x.flatten(0, 1)).view_as(x))
        with spliced(model, low), spliced(model, high):
            torch.testing.assert_close(model.base_model(tokens).last_hidden_state, expected)
            torch.testing.assert_close(downstream(model, 1, lower), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "falcon"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_generation_with_a_cache_is_that_without(kind: str, layer: int) -> None:
    model, tokens, sae = tiny_model(kind), ids(2, 5), small_sae(layer)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # padding on the left
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    plain = model.generate(tokens, **options)
    with spliced(model, sae):
        cached = model.generate(tokens, use_cache=True, **options)
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    assert not torch.equal(cached, plain)


def test_an_sae_computes_in_its_own_precision() -> None:
    model = tiny_model().to(torch.bfloat16)
    seen: list[torch.dtype] = []

    def edit(sparse: Sparse) -> Sparse:
        seen.append(sparse.values.dtype)
        return sparse

    with spliced(model, small_sae(2), edit):
        assert model(ids()).logits.dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_hooks_are_gone_after_an_error() -> None:
    model, tokens = tiny_model(), ids()
    expected = model(tokens).logits
    for layer in (2, LAYERS):
        with pytest.raises(KeyboardInterrupt), spliced(model, small_sae(layer)):
            raise KeyboardInterrupt
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ModelError, match="layer 4 does not exist"), spliced(model, small_sae(4)):
        pass
    with pytest.raises(ConceptError, match="has width 16, the model has 32"), spliced(model, small_sae(1, d=16)):
        pass
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        downstream(model, 9, torch.zeros(1, 2, D))
