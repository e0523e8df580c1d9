"""Block CG against dense solves and scipy's cg in float64; indefinite, singular and broken systems; stored states."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curate.curvature import conjugate_gradient as cg
from curate.curvature.conjugate_gradient import CGSpec, Report, State, conjugate_gradient
from curate.curvature.products import Products
from curate.errors import ConfigError, CurvatureError
from curate.models.tracked import tracked_layers
from tests.curvature.curves import FEW, ROWS, Dense, small

SHAPES = {"a": (3, 4), "b": (5, 2)}
N = sum(rows * columns for rows, columns in SHAPES.values())


def flat(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([v[name].flatten(1) for name in SHAPES], dim=1)


def unflat(v: Tensor) -> dict[str, Tensor]:
    parts = v.split([r * c for r, c in SHAPES.values()], dim=1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


class Matrix:
    """Products with a symmetric matrix of given eigenvalues; counts them, and how many vectors each one had."""

    def __init__(self, eigenvalues: Tensor, seed: int = 0) -> None:
        q, _ = torch.linalg.qr(torch.randn((N, N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        self.vectors, self.matrix = q, (q * eigenvalues) @ q.T
        self.calls: list[int] = []

    def __call__(self, v) -> dict[str, Tensor]:
        self.calls.append(len(v["a"]))
        return unflat(flat(v) @ self.matrix)


def right_hand_sides(q: int, seed: int = 1) -> Tensor:
    return torch.randn((q, N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_solves_as_a_dense_solver_and_scipy_do():
    damping = 0.01
    matrix = Matrix(torch.logspace(-3, 1, N, dtype=torch.float64))
    b = right_hand_sides(4)
    dense = matrix.matrix + damping * torch.eye(N, dtype=torch.float64)
    x, report = conjugate_gradient(matrix, unflat(b), damping, iterations=200, tolerance=1e-12)
    expected = torch.linalg.solve(dense, b.T).T
    assert (flat(x) - expected).abs().max() <= 1e-8 * expected.abs().max()
    assert all(report.converged)
    for i in range(4):
        theirs, failed = scipy.sparse.linalg.cg(dense.numpy(), b[i].numpy(), rtol=1e-12, atol=0, maxiter=400)
        assert not failed
        np.testing.assert_allclose(flat(x)[i].numpy(), theirs, atol=1e-8 * np.abs(theirs).max())


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_each_step_is_scipys(steps):
    """After as many steps, before anything has converged, the same iterate; one product a step for all items."""
    matrix = Matrix(torch.logspace(-2, 1, N, dtype=torch.float64))
    b = right_hand_sides(3)
    x, report = conjugate_gradient(matrix, unflat(b), 0.1, steps, 1e-12)
    dense = (matrix.matrix + 0.1 * torch.eye(N, dtype=torch.float64)).numpy()
    assert matrix.calls == [3] * steps
    assert report.iterations == (steps,) * 3
    for i in range(3):
        theirs, _ = scipy.sparse.linalg.cg(dense, b[i].numpy(), rtol=1e-14, maxiter=steps)
        np.testing.assert_allclose(flat(x)[i].numpy(), theirs, rtol=1e-9)
        true = np.linalg.norm(b[i].numpy() - dense @ theirs) / np.linalg.norm(b[i])
        assert report.last[i] == pytest.approx(true, rel=1e-6)
    assert len(report.residuals) == steps + 1
    assert report.residuals[0] == (1.0,) * 3


def test_an_item_that_has_converged_costs_nothing_more():
    matrix = Matrix(torch.linspace(1, 2, N, dtype=torch.float64))
    b = right_hand_sides(2)
    b[0] = 3.0 * matrix.vectors[:, 4]  # an eigenvector: one step
    x, report = conjugate_gradient(matrix, unflat(b), 0.0, 50, 1e-10, ["easy", "hard"])
    assert report.iterations[0] == 1 < report.iterations[1]
    assert matrix.calls == [2] + [1] * (report.iterations[1] - 1)
    np.testing.assert_allclose(flat(x)[0], b[0] / torch.linspace(1, 2, N, dtype=torch.float64)[4], rtol=1e-12)
    assert report.last[0] <= 1e-10


def test_what_has_not_converged_is_named_with_its_residual(caplog):
    matrix = Matrix(torch.logspace(-6, 1, N, dtype=torch.float64))
    with caplog.at_level(logging.WARNING, "curate"):
        _, report = conjugate_gradient(matrix, unflat(right_hand_sides(2)), 0.0, 3, 1e-8, ["one", "two"])
    assert report.converged == (False, False)
    assert f"the solve of 'two' has not converged: residual {report.last[1]:.3g} after 3 steps" in caplog.text
    assert "raise curvature.iterations or the damping" in caplog.text
    assert "0 of 2 converged after at most 3 steps" in str(report)


def test_negative_curvature_ends_the_item_that_meets_it_and_no_other(caplog):
    eigenvalues = torch.linspace(1, 3, N, dtype=torch.float64)
    eigenvalues[5] = -2.0
    matrix = Matrix(eigenvalues)
    b = right_hand_sides(2)
    b[0] -= (b[0] @ matrix.vectors[:, 5]) * matrix.vectors[:, 5]  # never sees it
    b[1] += 5 * matrix.vectors[:, 5]
    b[1] += 40 * matrix.vectors[:, 7]  # its first direction has positive curvature
    with caplog.at_level(logging.WARNING, "curate"):
        x, report = conjugate_gradient(matrix, unflat(b), 0.0, 60, 1e-10, ["sound", "bad"])
    assert report.converged == (True, False)
    assert report.stopped == (False, True)
    assert report.negative[0] == 0 < report.negative[1]
    assert 0 < report.iterations[1] < report.iterations[0]
    expected = torch.linalg.solve(matrix.matrix, b[0])
    np.testing.assert_allclose(flat(x)[0], expected, rtol=1e-8)
    # The last good iterate: what as many steps of scipy's give.
    theirs, _ = scipy.sparse.linalg.cg(matrix.matrix.numpy(), b[1].numpy(), rtol=1e-14, maxiter=report.iterations[1])
    np.testing.assert_allclose(flat(x)[1], theirs, rtol=1e-8)
    assert "not positive definite for 'bad'" in caplog.text
    assert "curvature.product=gauss_newton" in caplog.text
    assert "negative curvature met by 1, which ended 1" in str(report)
    # With enough damping the same system is definite; the curvature that was negative is still told.
    _, damped = conjugate_gradient(matrix, unflat(b), 3.0, 60, 1e-10)
    assert damped.converged == (True, True)
    assert damped.stopped == (False, False)
    assert damped.negative[0] == 0


def test_a_solve_that_cannot_take_a_step_is_an_error():
    matrix = Matrix(torch.full((N,), -1.0, dtype=torch.float64))
    with pytest.raises(CurvatureError, match=r"the solve of '0' did not take a step.*gauss_newton"):
        conjugate_gradient(matrix, unflat(right_hand_sides(1)), 0.5)


@pytest.mark.parametrize(("value", "said"), [(0.0, "zero"), (float("nan"), "not finite"), (float("inf"), "not finite")])
def test_right_hand_sides_that_cannot_be_solved_for(value, said):
    b = right_hand_sides(2)
    b[1] = value
    with pytest.raises(CurvatureError, match=f"the gradient of 'second' is {said}"):
        conjugate_gradient(Matrix(torch.ones(N, dtype=torch.float64)), unflat(b), 0.1, names=["first", "second"])


def test_a_product_that_is_not_finite_is_an_error():
    calls = []

    def multiply(v):
        calls.append(1)
        return {
            name: part * (float("nan") if len(calls) == 2 else torch.arange(1.0, N)[:1]) for name, part in v.items()
        }

    matrix = Matrix(torch.linspace(1, 2, N, dtype=torch.float64))
    with pytest.raises(CurvatureError, match=r"step 2 of the solve of '0' is not finite"):
        conjugate_gradient(
            lambda v: multiply(v) if calls else (calls.append(1), matrix(v))[1], unflat(right_hand_sides(1)), 0.0
        )


def test_a_state_goes_on_from_its_tensors_as_if_never_stopped():
    matrix = Matrix(torch.logspace(-2, 1, N, dtype=torch.float64))
    b, names = unflat(right_hand_sides(3)), ["x", "y", "z"]
    whole, report = conjugate_gradient(matrix, b, 0.01, 12, 1e-9, names)
    state = cg.start(b, names)
    for until in (5, 10, 12):
        state = cg.advance(State.from_tensors(state.tensors()), matrix, 0.01, until, 1e-9, names)
    assert torch.equal(flat(state.x), flat(whole))
    assert cg.finish(state, 0.01, 1e-9, names) == report
    assert not b["a"].equal(state.r["a"])  # the right-hand side itself is left alone
    told = State.from_tensors({k: v for k, v in state.tensors().items() if k.startswith("fact/")})
    assert cg.finish(told, 0.01, 1e-9, names) == report


def test_reports_of_blocks_join():
    matrix = Matrix(torch.linspace(1, 2, N, dtype=torch.float64))
    b = right_hand_sides(3)
    _, first = conjugate_gradient(matrix, unflat(b[:2]), 0.0, 50, 1e-10, ["x", "y"])
    _, second = conjugate_gradient(matrix, unflat(b[2:]), 0.0, 2, 1e-10, ["z"])
    both = Report.join([first, second])
    assert both.names == ("x", "y", "z")
    assert both.last == (*first.last, *second.last)
    assert both.converged == (True, True, False)
    body = both.body()
    assert body["z"]["iterations"] == 2
    assert body["x"]["residuals"][0] == 1.0
    assert len(both.warnings(1e-10)) == 1


def test_mean_eigenvalue():
    matrix = Matrix(torch.linspace(0.5, 1.5, N, dtype=torch.float64))
    like = {name: torch.zeros((0, *shape), dtype=torch.float64) for name, shape in SHAPES.items()}
    found = [cg.mean_eigenvalue(matrix, like, seed) for seed in range(40)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.02)
    assert cg.mean_eigenvalue(matrix, like, 3) == found[3]
    exact = Matrix(torch.full((N,), 0.25, dtype=torch.float64))
    assert cg.mean_eigenvalue(exact, like) == pytest.approx(0.25)  # of a multiple of I no estimate errs
    with pytest.raises(CurvatureError, match=r"mean eigenvalue .* cannot be relative.*damping_kind=absolute"):
        cg.mean_eigenvalue(Matrix(torch.full((N,), -0.25, dtype=torch.float64)), like)


@pytest.mark.parametrize("product", ["gauss_newton", "hessian"])
def test_solves_with_products_of_a_model_as_the_dense_matrix_does(product):
    model = small("gpt2")
    layers, _ = tracked_layers(model, FEW)
    dense = Dense(model, layers, ROWS)
    matrix = getattr(dense, product)()
    damping = 1e-2 if product == "gauss_newton" else 0.1 - float(torch.linalg.eigvalsh(matrix).min())
    b = torch.randn((2, len(matrix)), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, report = conjugate_gradient(Products(model, layers, ROWS, product), dense.unflat(b), damping, 300, 1e-11)
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=torch.float64), b.T).T
    assert all(report.converged)
    assert (dense.flat(x) - expected).abs().max() <= 1e-8 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"product": "fisher"}, r"curvature\.product is 'fisher'"), ({"rows": 0}, r"curvature\.rows is 0"),
     ({"iterations": 0}, r"curvature\.iterations is 0"), ({"tolerance": 1.0}, r"curvature\.tolerance is 1\.0"),
     ({"block": 0}, r"curvature\.block"), ({"save_every": 0}, r"curvature\.save_every"),
     ({"max_tokens": 1}, r"curvature\.max_tokens is 1")],
)  # fmt: skip
def test_settings_that_make_no_sense(options, said):
    with pytest.raises(ConfigError, match=said):
        CGSpec(**options)
