"""EK-FAC against definitions by autograd and dense algebra, in float64."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from curate.corpus.render import Rendered
from curate.curvature import ekfac
from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.ekfac import (
    Bases,
    Corrections,
    Damping,
    Eigenbasis,
    Factor,
    accumulate_corrections,
    eigenbasis,
    make_factor,
    solve,
)
from curate.curvature.fisher import CurvatureSpec
from curate.errors import ConfigError, CurvatureError
from curate.models.tracked import LayerChoice, TrackedLayer, tracked_layers
from tests.curvature.oracle import count, make_rows, names_of, response_loss, weight_gradients
from tests.tiny import tiny_model

ROWS = make_rows(7)
LAYER = TrackedLayer("layer", 3, 4, 0, "layer")


def fit(model, layers, rows, spec=None, budget=40, names=None):
    """(bases, corrections) of these rows."""
    spec = spec or CurvatureSpec()
    names = names or names_of(rows)
    cov = accumulate_covariances(model, layers, spec, rows, names, budget, 3, Covariances())
    bases = Bases(
        {reads: eigenbasis(cov.input_factor(reads), reads) for reads in {layer.reads for layer in layers}},
        {layer.name: eigenbasis(cov.output_factor(layer.name), layer.name) for layer in layers},
    )
    given = None if spec.kind == "diagonal" else bases
    return bases, accumulate_corrections(model, layers, spec, given, rows, names, budget, 3, Corrections())


def factor_of(layer, kind, bases, corrections):
    if kind == "diagonal":
        return make_factor(layer, kind, corrected=corrections.eigenvalues(layer.name))
    return make_factor(
        layer, kind, bases.inputs[layer.reads], bases.outputs[layer.name], corrections.eigenvalues(layer.name)
    )


def orthogonal(n, seed):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_eigenvalues_equal_their_definition(family, reduction, monkeypatch):
    monkeypatch.setattr(ekfac, "_GRADIENTS", 2 * 64 * 32)  # so that examples go in several blocks
    model = tiny_model(family, layers=2).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    bases, got = fit(model, layers, ROWS, CurvatureSpec(fisher="empirical", reduction=reduction))
    want = {layer.name: 0.0 for layer in layers}
    for row in ROWS:
        gradients = weight_gradients(model, layers, row.input_ids, response_loss(row))
        for layer in layers:
            g = gradients[layer.name] / (count(row) if reduction == "mean" else 1)
            rotated = bases.outputs[layer.name].vectors.T @ g @ bases.inputs[layer.reads].vectors
            want[layer.name] = want[layer.name] + rotated**2 / len(ROWS)
    for name, value in want.items():
        torch.testing.assert_close(got.eigenvalues(name), value, rtol=1e-5, atol=1e-5 * float(value.mean()))


def test_diagonal_is_the_mean_square_of_each_weights_gradient():
    model = tiny_model("llama", layers=2).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    _, got = fit(model, layers, ROWS, CurvatureSpec(kind="diagonal", fisher="empirical"))
    gradients = [weight_gradients(model, layers, r.input_ids, response_loss(r)) for r in ROWS]
    for layer in layers:
        squares = torch.stack([(g[layer.name] / count(r)) ** 2 for g, r in zip(gradients, ROWS, strict=True)])
        want = squares.mean(0)
        torch.testing.assert_close(got.eigenvalues(layer.name), want, rtol=1e-5, atol=1e-6 * float(want.max()))
        v = torch.randn(layer.out, layer.width, dtype=torch.float64)
        factor = factor_of(layer, "diagonal", None, got)
        torch.testing.assert_close(
            solve(factor, v, Damping(0.5)), v / (want + 0.5 * want.mean()), rtol=1e-5, atol=1e-5 / float(want.mean())
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampled_labels_converge_to_the_exact_fisher(reduction):
    """The vocabulary is so small that every label can be tried: Λ = (1/n) Σ_t Σ_y p(y) (Q_Bᵀ G_ty Q_A)²."""
    model = tiny_model("llama", layers=1, d=8, vocab=6, scale=0.5).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    row = Rendered([1, 4, 5, 2, 1, 3], 3, 5, 6)
    spec = CurvatureSpec(reduction=reduction)
    bases, _ = fit(model, layers, [row] * 8, spec)
    exact = {layer.name: torch.zeros(layer.out, layer.width, dtype=torch.float64) for layer in layers}
    probabilities = model(input_ids=torch.tensor([row.input_ids])).logits[0].softmax(-1)
    scale = count(row) if reduction == "mean" else 1
    for t, y in itertools.product(range(row.start, row.end), range(6)):
        gradients = weight_gradients(
            model, layers, row.input_ids, lambda logits, t=t, y=y: -logits[t - 1].log_softmax(-1)[y]
        )
        for layer in layers:
            rotated = bases.outputs[layer.name].vectors.T @ gradients[layer.name] @ bases.inputs[layer.reads].vectors
            exact[layer.name] += probabilities[t - 1, y] * rotated**2 / scale

    def error(n):
        got = accumulate_corrections(
            model, layers, spec, bases, [row] * n, [f"s{i}" for i in range(n)], 3000, 3, Corrections()
        )
        parts = [(got.eigenvalues(name) - want, want) for name, want in exact.items()]
        return sum(float(d.norm()) for d, _ in parts) / sum(float(w.norm()) for _, w in parts)

    few, many = error(60), error(6000)
    assert many < 0.05
    assert many < few / 3  # 1/√100 but for luck


def test_order_batches_and_partial_sums_change_nothing():
    model = tiny_model("llama", layers=2).double()
    layers, _ = tracked_layers(model, LayerChoice("all"))
    spec, names = CurvatureSpec(), names_of(ROWS)
    bases, want = fit(model, layers, ROWS)
    alone = accumulate_corrections(model, layers, spec, bases, ROWS, names, 1, 3, Corrections())
    parts = Corrections()
    for part in (slice(5, 7), slice(0, 5)):
        some = accumulate_corrections(model, layers, spec, bases, ROWS[part], names[part], 50, 3, Corrections())
        parts.merge(Corrections.from_state(some.state_dict()))
    for other in (alone, parts):
        assert other.counts == want.counts == {"examples": 7}
        for key, tensor in want.tensors.items():
            torch.testing.assert_close(other.tensors[key], tensor, rtol=1e-5, atol=1e-6 * float(tensor.mean()))


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_solve_equals_the_dense_inverse_of_independent_inputs_and_deltas(kind):
    """Every input with every δ: E[vec G vec Gᵀ] = B ⊗ A exactly, and both kinds are that."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 4, dtype=torch.float64, generator=g)
    b = torch.randn(6, 3, dtype=torch.float64, generator=g)
    q_in, q_out = eigenbasis(a.T @ a / 5, "in"), eigenbasis(b.T @ b / 6, "out")
    gradients = torch.stack([torch.outer(delta, x) for x in a for delta in b])
    corrected = (q_out.vectors.T @ gradients @ q_in.vectors).square().mean(0)
    dense = torch.einsum("nij,nkl->ijkl", gradients, gradients).reshape(12, 12) / 30
    factor = make_factor(LAYER, kind, q_in, q_out, corrected)
    v = torch.randn(2, 3, 4, dtype=torch.float64, generator=g)
    for damping, added in ((Damping(1e-3, "absolute"), 1e-3), (Damping(0.1), 0.1 * float(dense.trace()) / 12)):
        want = torch.linalg.solve(dense + added * torch.eye(12, dtype=torch.float64), v.reshape(2, 12).T).T
        torch.testing.assert_close(solve(factor, v, damping), want.reshape(2, 3, 4), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(solve(factor, v[1], damping), want[1].reshape(3, 4), rtol=1e-8, atol=1e-10)


def test_solve_equals_the_dense_inverse_through_a_model():
    """One example with one response token, layers of the last block that see that token only: rank one, so exact."""
    model = tiny_model("llama", layers=2, d=8, scale=0.3).double()
    layers, _ = tracked_layers(model, LayerChoice("all", first=1, pattern="o_proj|down_proj|gate_proj"))
    row = Rendered([5, 9, 17, 40, 41], 4, 5, 5)
    bases, corrections = fit(model, layers, [row], CurvatureSpec(fisher="empirical", tokens="loss"))
    gradients = weight_gradients(model, layers, row.input_ids, response_loss(row))
    for layer in layers:
        g = gradients[layer.name].flatten()
        h = torch.outer(g, g)
        added = 0.1 * float(h.trace()) / layer.size
        v = torch.randn(layer.out, layer.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        want = torch.linalg.solve(h + added * torch.eye(layer.size, dtype=torch.float64), v.flatten())
        got = solve(factor_of(layer, "ekfac", bases, corrections), v, Damping())
        torch.testing.assert_close(got.flatten(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_ekfac_is_nearer_to_the_fisher_than_kfac():
    model = tiny_model("llama", layers=2, d=8, scale=0.3).double()
    layers, _ = tracked_layers(model, LayerChoice("attention"))
    rows = make_rows(40, seed=3)
    bases, corrections = fit(model, layers, rows, CurvatureSpec(fisher="empirical"))
    gradients = [weight_gradients(model, layers, r.input_ids, response_loss(r)) for r in rows]
    for layer in layers:
        g = torch.stack([found[layer.name].flatten() / count(r) for found, r in zip(gradients, rows, strict=True)])
        dense = g.T @ g / len(rows)
        errors = {}
        for kind in ("ekfac", "kfac"):
            f = factor_of(layer, kind, bases, corrections)
            basis = torch.kron(f.q_out, f.q_in)
            errors[kind] = torch.linalg.norm(basis * f.eigenvalues.flatten() @ basis.T - dense)
        assert errors["ekfac"] <= errors["kfac"]  # the diagonal is the best one in that basis


@pytest.mark.parametrize(("tokens", "free"), [("all", True), ("loss", False)])
def test_how_a_null_space_is_spanned_changes_nothing(tokens, free):
    """Rounding spans it anew in every fit. With the inputs of all tokens in A no gradient reaches it; with those of the
    response alone the prompt's do, and there the result is arbitrary."""
    model = tiny_model("llama").double()
    layers, _ = tracked_layers(model, LayerChoice("attention", last=1, pattern="q_proj"))
    # Few different tokens, and others in the prompt than in the response: few different inputs of the first block.
    rows = [
        Rendered([4 + (i + t) % 5 for t in range(5)] + [30] + [20 + (i * t) % 4 for t in range(6)], 6, 12, 12)
        for i in range(6)
    ]
    names, spec = names_of(rows), CurvatureSpec(tokens=tokens)
    bases, corrections = fit(model, layers, rows, spec)
    basis = bases.inputs[layers[0].reads]
    null = int((basis.values < 1e-12 * basis.values.max()).sum())
    assert null > 8
    turned = torch.cat([basis.vectors[:, :null] @ orthogonal(null, 1), basis.vectors[:, null:]], dim=1)
    other = Bases({layers[0].reads: Eigenbasis(turned, basis.values)}, bases.outputs)
    again = accumulate_corrections(model, layers, spec, other, rows, names, 40, 3, Corrections())
    v = torch.randn(layers[0].out, layers[0].width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    a = solve(factor_of(layers[0], "ekfac", bases, corrections), v, Damping(0.01))
    b = solve(factor_of(layers[0], "ekfac", other, again), v, Damping(0.01))
    assert ((a - b).norm() / a.norm() < 1e-6) == free


def test_identity_gives_the_gradient_itself():
    v = torch.randn(3, 4)
    assert torch.equal(solve(make_factor(LAYER, "identity"), v, Damping()), v)


def test_a_failing_eigensolver_is_followed_by_float64(monkeypatch, caplog):
    solver = torch.linalg.eigh
    a = torch.randn(20, 6)
    matrix = a.T @ a

    def fails(m):
        if m.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return solver(m)

    def gives_nan(m):
        values, vectors = solver(m)
        return (values, vectors * float("nan")) if m.dtype == torch.float32 else (values, vectors)

    for broken in (fails, gives_nan):
        caplog.clear()
        monkeypatch.setattr(torch.linalg, "eigh", broken)
        with caplog.at_level(logging.WARNING):
            found = eigenbasis(matrix, "model.layers.3.q_proj")
        assert "model.layers.3.q_proj" in caplog.text
        assert "float64" in caplog.text
        assert found.vectors.dtype == torch.float32
        torch.testing.assert_close(found.vectors * found.values @ found.vectors.T, matrix, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    with pytest.raises(CurvatureError, match=r"q_proj.*float64 either"):
        eigenbasis(matrix, "model.layers.3.q_proj")


def test_eigenvalues_below_zero_are_rounding():
    a = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))  # rank 2 of 40
    assert float(eigenbasis(a.T @ a, "x").values.min()) >= 0


def test_a_covariance_that_is_not_finite():
    with pytest.raises(CurvatureError, match="'here' is not finite"):
        eigenbasis(torch.full((3, 3), float("inf")), "here")


def test_all_eigenvalues_zero(caplog):
    v, zero = torch.ones(3, 4), torch.zeros(3, 4)
    factor = make_factor(LAYER, "diagonal", corrected=zero)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(solve(factor, v, Damping(0.1)), zero)
        torch.testing.assert_close(solve(factor, v, Damping(0.5, "absolute")), 2 * v)
    assert caplog.text.count("all eigenvalues of 'layer' are zero") == 2


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_no_damping_on_a_singular_factor(kind):
    values = torch.tensor([[1.0, 0.0, 2.0, 1.0]] * 3)
    with pytest.raises(CurvatureError, match=r"'layer' is singular.*damping"):
        solve(make_factor(LAYER, "diagonal", corrected=values), torch.ones(3, 4), Damping(0.0, kind))
    regular = make_factor(LAYER, "diagonal", corrected=values + 1)
    torch.testing.assert_close(solve(regular, torch.ones(3, 4), Damping(0.0, kind)), 1 / (values + 1))


def test_what_cannot_be_solved():
    factor = make_factor(LAYER, "diagonal", corrected=torch.ones(3, 4))
    with pytest.raises(CurvatureError, match=r"\(4, 3\).*'layer'.*\(3, 4\)"):
        solve(factor, torch.ones(4, 3), Damping())
    with pytest.raises(CurvatureError, match="'layer' is not finite"):
        solve(factor, torch.full((3, 4), float("nan")), Damping())


@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_gradients_that_are_not_finite_name_the_row(kind):
    model = tiny_model("llama", layers=2)
    layers, _ = tracked_layers(model, LayerChoice("mlp"))
    bases, _ = fit(model, layers, ROWS)

    def spoil(module, given, out):
        broken = given[0].clone()
        broken[..., -1] = float("nan")
        return (broken,)

    model.model.layers[1].mlp.act_fn.register_full_backward_hook(spoil)  # the last output of the gate, [64, 32]
    spec, given = CurvatureSpec(kind=kind), None if kind == "diagonal" else bases
    with pytest.raises(CurvatureError, match=r"'only'.*not finite"):
        accumulate_corrections(model, layers, spec, given, ROWS[:1], ["only"], 40, 3, Corrections())


def test_factors_that_cannot_be():
    basis = {n: Eigenbasis(orthogonal(n, n), torch.ones(n)) for n in (3, 4)}
    with pytest.raises(CurvatureError, match="'layer' holds values that are not finite"):
        make_factor(LAYER, "ekfac", basis[4], basis[3], torch.full((3, 4), float("nan")))
    with pytest.raises(CurvatureError, match="needs the eigenbases"):
        make_factor(LAYER, "ekfac", None, basis[3], torch.ones(3, 4))
    with pytest.raises(CurvatureError, match="lacks a part"):
        make_factor(LAYER, "ekfac", basis[4], basis[3])
    with pytest.raises(CurvatureError, match="unknown kind 'other'"):
        Factor(LAYER, "other")
    with pytest.raises(CurvatureError, match="no correction of 'layer'"):
        Corrections().eigenvalues("layer")


@pytest.mark.parametrize(("value", "kind"), [(-0.1, "relative"), (float("nan"), "absolute"), (0.1, "relatve")])
def test_damping_that_makes_no_sense(value, kind):
    with pytest.raises(ConfigError, match="damping"):
        Damping(value, kind)
