"""Products with the Hessian and the Gauss–Newton matrix against the dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from curate.corpus.render import Rendered
from curate.curvature import output_hessian
from curate.curvature.ekfac import Corrections, accumulate_corrections
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.products import Products
from curate.errors import ConfigError, CurvatureError, ModelError
from curate.models.tracked import LayerChoice, tracked_layers
from tests.curvature.curves import FEW, ROWS, Dense, random_sae, small, vectors
from tests.curvature.oracle import names_of
from tests.tiny import tiny_model

# GPT-2 and GPT-NeoX are float64 throughout; the others' norms work in float32 whatever the model's precision.
EXACT = {"gpt2": 1e-9, "neox": 1e-9}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("product", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("llama", "mean"), ("qwen3", "sum"), ("gemma2", "mean"), ("gpt2", "mean"), ("gpt2", "sum"), ("neox", "mean")],
)
def test_products_are_those_of_the_dense_matrix(kind, reduction, product):
    model = small(kind)
    layers, _ = tracked_layers(model, FEW)
    dense = Dense(model, layers, ROWS, reduction)
    matrix = getattr(dense, product)()
    v = vectors(layers, 3)
    found = Products(model, layers, ROWS, product, reduction, max_tokens=20)(v)
    assert {name: part.shape for name, part in found.items()} == {name: part.shape for name, part in v.items()}
    close(dense.flat(found), dense.flat(v) @ matrix, EXACT.get(kind, 1e-6))


@pytest.mark.parametrize("product", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("lowest", [1, 2])
def test_with_an_sae_spliced_in_they_are_those_of_the_spliced_model(product, lowest):
    model, sae = small("gpt2"), random_sae(1)
    layers, _ = tracked_layers(model, LayerChoice("attention", first=lowest, pattern="c_proj"))
    dense = Dense(model, layers, ROWS, sae=sae)
    v = vectors(layers, 2)
    found = Products(model, layers, ROWS, product, sae=sae)(v)
    close(dense.flat(found), dense.flat(v) @ getattr(dense, product)(), 1e-9)
    plain = Products(model, layers, ROWS, product)(v)
    assert (dense.flat(plain) - dense.flat(found)).abs().max() > 1e-3 * dense.flat(found).abs().max()


@pytest.mark.parametrize("product", ["gauss_newton", "hessian"])
def test_the_matrices_of_an_adapter(product):
    model = small("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), model)
    model.double().requires_grad_(False).eval()
    layers, _ = tracked_layers(model, LayerChoice("adapter", first=1))
    dense = Dense(model, layers, ROWS)
    v = vectors(layers, 2)
    found = dense.flat(Products(model, layers, ROWS, product)(v))
    close(found, dense.flat(v) @ getattr(dense, product)(), 1e-6)


def test_sampled_labels_give_the_gauss_newton_diagonal_in_the_limit():
    """The diagonal of EK-FAC's true Fisher, labels drawn again and again, tends to that of the Gauss–Newton matrix."""
    model = small("gpt2", layers=2, scale=0.3)
    layers, _ = tracked_layers(model, LayerChoice("attention", first=1, pattern="c_proj"))
    dense = Dense(model, layers, ROWS)
    size, draws = len(dense.theta), 150
    sums = Corrections()
    for seed in range(draws):
        spec = CurvatureSpec("diagonal", seed=seed)
        accumulate_corrections(model, layers, spec, None, ROWS, names_of(ROWS), 1000, 3, sums)
    fisher = dense.flat({x.name: sums.eigenvalues(x.name)[None] for x in layers})[0]
    unit = dense.unflat(torch.eye(size, dtype=torch.float64))
    diagonal = dense.flat(Products(model, layers, ROWS)(unit)).diagonal()
    assert float(fisher.sum()) == pytest.approx(float(diagonal.sum()), rel=0.1)
    assert torch.corrcoef(torch.stack([fisher, diagonal]))[0, 1] > 0.98


def test_chunks_of_positions_and_batches_change_nothing(monkeypatch):
    model = small("gemma2")  # its head caps the logits
    layers, _ = tracked_layers(model, FEW)
    v = vectors(layers, 2)
    for product in ("gauss_newton", "hessian"):
        whole = Products(model, layers, ROWS, product)(v)
        with monkeypatch.context() as patched:
            patched.setattr(output_hessian, "_LOGITS", 3 * 40 * 2)  # two positions at once, or one
            parts = Products(model, layers, ROWS, product, max_tokens=1)(v)
        for name in whole:
            close(parts[name], whole[name], 1e-6)


def test_they_are_linear_symmetric_and_leave_the_model_alone():
    model = tiny_model("qwen2", layers=2, d=16)  # float32
    layers, _ = tracked_layers(model, LayerChoice("all", first=1))
    before = {n: w.clone() for n, w in model.named_parameters()}
    for product in ("gauss_newton", "hessian"):
        products = Products(model, layers, ROWS, product)
        v = {name: part.float() for name, part in vectors(layers, 2).items()}
        hv = products(v)
        gram = sum(torch.einsum("qoi,poi->qp", v[n], hv[n]) for n in v)
        assert float((gram - gram.T).abs().max()) <= 1e-5 * float(gram.abs().max())
        doubled = products({name: 2 * part for name, part in v.items()})
        for name in v:
            torch.testing.assert_close(doubled[name], 2 * hv[name], rtol=1e-4, atol=1e-5 * float(hv[name].abs().max()))
        assert product == "hessian" or bool((gram.diagonal() > 0).all())
    assert all(torch.equal(before[n], w) for n, w in model.named_parameters())
    assert not any(w.requires_grad for w in model.parameters())


def test_what_cannot_be_multiplied_is_said():
    model = tiny_model("llama", layers=2, d=16)
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    with pytest.raises(CurvatureError, match="there is no row"):
        Products(model, layers, [])
    with pytest.raises(CurvatureError, match="no tracked layer"):
        Products(model, [], ROWS)
    with pytest.raises(CurvatureError, match=r"row 1 .* has no response token"):
        Products(model, layers, [ROWS[0], Rendered([4, 5, 6], 3, 3, 3)])
    with pytest.raises(ConfigError, match="the curvature's product is 'gauss'; choose from"):
        Products(model, layers, ROWS, "gauss")
    with pytest.raises(
        CurvatureError, match=r"spliced in at layer 1, but the tracked layers begin at block 0.*first=1"
    ):
        Products(model, layers, ROWS, sae=random_sae(1, d=16))
    products = Products(model, layers, ROWS)
    v = {name: part.float() for name, part in vectors(layers, 1).items()}
    with pytest.raises(CurvatureError, match="of other layers than the products"):
        products({name: v[name] for name in list(v)[1:]})
    with pytest.raises(CurvatureError, match=r"a vector of the shape .* for the layer"):
        products({**v, layers[0].name: torch.zeros(1, 2, 2)})
    v[layers[0].name][:] = float("inf")
    with pytest.raises(CurvatureError, match=r"gauss-newton product over 4 rows is not finite"):
        products(v)
    model.requires_grad_(True)
    with pytest.raises(ModelError, match="require gradients"):
        Products(model, layers, ROWS)
