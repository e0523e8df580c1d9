"""Sparse autoencoders against plain formulas in float64: encoding, decoding, derivatives, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from curate.concepts import decode as sums
from curate.concepts.sae import (
    SAE,
    Sparse,
    check_fits,
    decode,
    dense,
    digest,
    encode,
    folded,
    keep,
    preactivations,
    reconstruct,
)
from curate.errors import ConceptError

H, D, N = 24, 8, 11
FORMS = ("topk", "relu", "jumprelu")


def some_sae(activation: str = "topk", *, seed: int = 0, h: int = H, d: int = D, **changes: object) -> SAE:
    """A random SAE in float64 with all parts different from zero."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    values: dict[str, object] = {
        "w_enc": draw(h, d),
        "b_enc": 0.3 * draw(h),
        "w_dec": draw(h, d),
        "b_pre": 0.5 * draw(d),
        "b_dec": 0.5 * draw(d),
        "activation": activation,
        "layer": 2,
        "name": "tiny",
        "k": 5 if activation == "topk" else None,
        "threshold": 0.8 * draw(h).abs() if activation == "jumprelu" else None,
        "model": {"name": "Tiny 3x8", "digest": "aa", "adapter": None},
    }
    return SAE(**{**values, **changes})  # type: ignore[arg-type]


def states(n: int = N, seed: int = 1) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_formula(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """r and x̃, one state at a time, from the formulas in words."""
    rows, outs = [], []
    for state in x:
        mean, gain = torch.zeros(()).double(), torch.ones(()).double() / sae.scale
        s = state * sae.scale
        if sae.normalise == "constant_norm":
            gain = state.norm() / sae.width**0.5
            s = state / gain
        elif sae.normalise == "layer_norm":
            mean, gain = state.mean(), state.std()
            s = (state - mean) / (gain + 1e-5)
        r = torch.zeros(sae.latents, dtype=x.dtype)
        p = [float(sae.w_enc[i] @ (s - sae.b_pre) + sae.b_enc[i]) for i in range(sae.latents)]
        chosen = sorted(range(sae.latents), key=lambda i: -p[i])[: sae.k or sae.latents]
        for i in chosen:
            if p[i] > (0.0 if sae.threshold is None else max(0.0, float(sae.threshold[i]))):
                r[i] = p[i]
        rows.append(r)
        outs.append((sum(r[i] * sae.w_dec[i] for i in range(sae.latents)) + sae.b_dec) * gain + mean)
    return torch.stack(rows), torch.stack(outs)


def as_dense(sae: SAE, sparse: Sparse) -> Tensor:
    return torch.zeros(len(sparse.values), sae.latents).to(sparse.values).scatter_add(1, sparse.indices, sparse.values)


@pytest.mark.parametrize("activation", FORMS)
@pytest.mark.parametrize(
    "form", [{}, {"scale": 0.4}, {"normalise": "constant_norm"}, {"normalise": "layer_norm"}], ids=str
)
def test_activations_and_reconstructions_are_the_formulas(activation: str, form: dict[str, object]) -> None:
    sae, x = some_sae(activation, **form), states()
    r, out = by_formula(sae, x)
    sparse = encode(sae, x)
    torch.testing.assert_close(dense(sae, x), r)
    torch.testing.assert_close(as_dense(sae, sparse), r)
    torch.testing.assert_close(decode(sae, sparse), out)
    torch.testing.assert_close(reconstruct(sae, x), out)
    assert sparse.values.min() >= 0
    assert int(sparse.indices[~sparse.active].sum()) == 0
    assert sparse.values.shape[1] == (5 if activation == "topk" else int((r > 0).sum(1).max()))


def test_batches_of_any_shape_for_what_is_dense() -> None:
    sae, x = some_sae(), states(12)
    torch.testing.assert_close(dense(sae, x.view(3, 4, D)).view(12, H), dense(sae, x))
    torch.testing.assert_close(preactivations(sae, x.view(3, 4, D)).view(12, H), preactivations(sae, x))


@pytest.mark.parametrize("activation", FORMS)
def test_states_that_activate_nothing_and_no_states(activation: str) -> None:
    sae = replace(some_sae(activation), b_enc=torch.full((H,), -1e3).double())
    sparse = encode(sae, states())
    assert not bool(sparse.active.any())
    torch.testing.assert_close(decode(sae, sparse), sae.b_dec.expand(N, D))
    assert reconstruct(sae, states(0)).shape == (0, D)


def test_topk_takes_no_latent_that_is_not_positive() -> None:
    sae = some_sae(k=H)
    torch.testing.assert_close(as_dense(sae, encode(sae, states())), torch.relu(preactivations(sae, states())))


@pytest.mark.parametrize("activation", FORMS)
def test_gradients_of_reconstructions_in_the_states(activation: str) -> None:
    sae = some_sae(activation, normalise="layer_norm" if activation == "relu" else "none")
    x = states(4).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: reconstruct(sae, x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: reconstruct(sae, x), (x,))


@pytest.mark.parametrize("activation", FORMS)
def test_gradients_in_the_weights_are_those_of_the_dense_form(activation: str) -> None:
    base, x = some_sae(activation), states()
    names = ("w_enc", "b_enc", "w_dec", "b_pre", "b_dec")

    def gradients(sparse: bool) -> list[Tensor]:
        sae = replace(base, **{n: getattr(base, n).clone().requires_grad_(True) for n in names})
        out = reconstruct(sae, x) if sparse else dense(sae, x) @ sae.w_dec + sae.b_dec
        return list(torch.autograd.grad(((out - x) ** 2).sum(), [getattr(sae, n) for n in names]))

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other)


def _sums_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    indices = torch.randint(0, 6, (4, 3), generator=g)  # some latents twice in a state, some in none
    values, u, w = (
        torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_(True) for s in ((4, 3), (4, 5), (6, 5))
    )
    return values, indices, u, w


def test_sparse_sums_are_their_formulas() -> None:
    values, indices, u, w = _sums_arguments()
    torch.testing.assert_close(sums.decode_sparse(values, indices, w), torch.einsum("nk,nkd->nd", values, w[indices]))
    torch.testing.assert_close(sums.read_rows(u, indices, w), torch.einsum("nd,nkd->nk", u, w[indices]))
    one_hot = torch.nn.functional.one_hot(indices, 6).double()
    expected = torch.einsum("nk,nkh,nd->hd", values, one_hot, u)
    torch.testing.assert_close(sums.outer_sum(values, indices, u, 6), expected)


def test_both_ways_to_sum_into_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    values, indices, u, _ = _sums_arguments()
    whole = sums.outer_sum(values, indices, u, 6)
    monkeypatch.setattr(sums, "_CHUNK", 13)  # two states at once
    torch.testing.assert_close(sums.outer_sum(values, indices, u, 6), whole)
    monkeypatch.setattr(sums, "_FEW", 0)
    torch.testing.assert_close(sums.outer_sum(values, indices, u, 6), whole)
    assert torch.autograd.gradcheck(lambda v, u: sums.outer_sum(v, indices, u, 6), (values, u), check_forward_ad=True)


def test_sparse_sums_of_nothing() -> None:
    none, w = torch.zeros(0, 3, dtype=torch.long), torch.ones(6, 5)
    assert sums.decode_sparse(torch.zeros(0, 3), none, w).shape == (0, 5)
    assert sums.read_rows(torch.zeros(0, 5), none, w).shape == (0, 3)
    assert not sums.outer_sum(torch.zeros(0, 3), none, torch.zeros(0, 5), 6).any()
    assert not sums.outer_sum(torch.zeros(0, 3), none, torch.zeros(0, 5), 600).any()


def test_sparse_sums_have_derivatives_of_first_and_second_order_in_both_modes() -> None:
    values, indices, u, w = _sums_arguments()
    for f, arguments in (
        (lambda v, w: sums.decode_sparse(v, indices, w), (values, w)),
        (lambda u, w: sums.read_rows(u, indices, w), (u, w)),
        (lambda v, u: sums.outer_sum(v, indices, u, 6), (values, u)),
    ):
        assert torch.autograd.gradcheck(f, arguments, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, arguments, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_reverse_over_forward_through_a_decoder() -> None:
    """∇_r of a directional derivative, as latent influence takes it: a backward of a tangent."""
    sae, x, direction = some_sae(), states(4), states(4, seed=9)
    sparse = encode(sae, x)
    values = sparse.values.clone().requires_grad_(True)

    def f(out: Tensor) -> Tensor:
        return (out.square() * direction.cos()).sum() + (out.prod(1)).sum()

    def derivative(values: Tensor) -> Tensor:
        """Of f in the output's bias, along `direction`."""
        out = decode(sae, replace(sparse, values=values))
        return torch.autograd.functional.jvp(lambda b: f(out + b), torch.zeros_like(x), direction, create_graph=True)[1]

    (expected,) = torch.autograd.grad(derivative(values), values)
    with fwAD.dual_level():
        bias = fwAD.make_dual(torch.zeros_like(x), direction)
        tangent = fwAD.unpack_dual(f(decode(sae, replace(sparse, values=values)) + bias)).tangent
        (found,) = torch.autograd.grad(tangent, values)
    torch.testing.assert_close(found, expected)


def test_moving_to_where_it_is_gives_it_back() -> None:
    sae = some_sae()
    assert sae.to("cpu", torch.float64) is sae is sae.to()
    assert sae.to(dtype=torch.float32).w_dec.dtype == torch.float32


def test_keep_masks_latents() -> None:
    sae, x = some_sae(), states()
    chosen = torch.zeros(H, dtype=torch.bool)
    chosen[::3] = True
    torch.testing.assert_close(as_dense(sae, keep(encode(sae, x), chosen)), dense(sae, x) * chosen)


def test_an_sae_that_normalises_decodes_only_what_it_encoded() -> None:
    sae = some_sae(normalise="layer_norm")
    sparse = encode(sae, states())
    with pytest.raises(ConceptError, match="decode what encode gave"):
        decode(sae, Sparse(sparse.values, sparse.indices))


@pytest.mark.parametrize("activation", FORMS)
def test_folding_leaves_the_function(activation: str) -> None:
    sae, x = some_sae(activation, scale=0.3), states()
    plain = folded(sae)
    assert plain.scale == 1.0
    assert not bool(plain.b_pre.any())
    torch.testing.assert_close(dense(plain, x), dense(sae, x))
    torch.testing.assert_close(reconstruct(plain, x), reconstruct(sae, x))
    same = replace(sae, b_pre=sae.b_dec, scale=1.0)
    assert folded(same) is same


def test_the_digest_changes_with_what_changes_a_number() -> None:
    sae = some_sae()
    others = [
        replace(sae, k=4),
        replace(sae, layer=1),
        replace(sae, name="other"),
        replace(sae, scale=2.0),
        replace(sae, normalise="layer_norm"),
        replace(sae, b_pre=sae.b_pre + 1e-3),
        replace(sae, model={"digest": "bb"}),
        some_sae("relu"),
    ]
    assert len({digest(s) for s in [sae, *others]}) == 1 + len(others)
    assert digest(replace(sae, meta={"epochs": 2})) == digest(sae) == digest(sae.to(dtype=torch.float32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"w_enc": torch.full((H, D), float("nan"))}, "w_enc holds NaN or infinite numbers \\(192 of 192\\)"),
        ({"b_dec": torch.full((D,), float("inf"))}, "b_dec holds NaN"),
        ({"w_dec": torch.zeros(H, D + 1)}, "w_dec has the shape \\[24, 9\\], expected \\[24, 8\\]"),
        ({"b_pre": torch.zeros(H)}, "b_pre has the shape"),
        ({"k": None}, "k=None"),
        ({"k": H + 1}, "k is from 1 to 24"),
        ({"k": 0}, "k is from 1 to 24"),
        ({"activation": "relu", "k": 3}, "topk alone takes a k"),
        ({"activation": "jumprelu", "threshold": None}, "needs a threshold"),
        ({"threshold": torch.zeros(H)}, "needs a threshold exactly if it is jumprelu"),
        ({"activation": "tpok"}, "did you mean 'topk'"),
        ({"normalise": "layernorm"}, "did you mean 'layer_norm'"),
        ({"scale": 0.0}, "must be above 0"),
        ({"scale": 2.0, "normalise": "layer_norm"}, "it takes one"),
        ({"layer": -1}, "numbered from 0"),
        ({"name": "a.b"}, "cannot be called 'a.b'"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_what_an_sae_cannot_be(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConceptError, match=said):
        some_sae(**changes)


def test_states_of_another_width_are_refused() -> None:
    with pytest.raises(ConceptError, match="has width 8, the model whose states these are has 9"):
        encode(some_sae(), torch.zeros(3, 9).double())


def test_an_sae_of_another_model_width_or_layer_does_not_fit() -> None:
    sae = some_sae()
    fits = {"name": "Tiny 3x8", "layers": 3, "width": D, "digest": "aa", "adapter": None}
    check_fits(sae, fits)
    check_fits(replace(sae, model={}), {**fits, "digest": "cc"})
    with pytest.raises(ConceptError, match=r"has width 8, Wide .* has 16"):
        check_fits(sae, {**fits, "name": "Wide", "width": 16})
    with pytest.raises(ConceptError, match=r"is of layer 2; .* has the layers 0 to 1"):
        check_fits(sae, {**fits, "layers": 1})
    with pytest.raises(ConceptError, match=r"made from Tiny .*Latents of one model mean nothing in another"):
        check_fits(sae, {**fits, "digest": "bb"})
    with pytest.raises(ConceptError, match="adapter ff"):
        check_fits(sae, {**fits, "adapter": "ff"})
    check_fits(sae, {**fits, "digest": "bb"}, allow_other_model=True)
    last = replace(sae, layer=3, meta={"hook": "blocks.2.hook_resid_post", "before_final_norm": True})
    with pytest.raises(ConceptError, match="before the final norm"):
        check_fits(last, fits)
    check_fits(last, {**fits, "layers": 4})
