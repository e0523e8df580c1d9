"""Terms of an SAE's loss against their formulas written out, finite differences in float64, and expectations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curate.training import sae_loss
from curate.training.sae_module import Autoencoder, Beginning, begin, geometric_median
from curate.training.sae_settings import SaeSettings


def states(n: int = 7, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(activation: str, d: int = 5, h: int = 9, **more: object) -> Autoencoder:
    settings = SaeSettings(latents=h, activation=activation, k=3, **more)
    made = Autoencoder(settings, Beginning(torch.full((d,), 0.1), 1.0), torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        made.b_enc.add_(0.1 * torch.randn(h, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return made


# by hand


def test_the_error_is_a_share_of_the_state_or_of_the_variance():
    x, rebuilt, centre = states(), states(seed=1), torch.full((5,), 0.2, dtype=torch.float64)
    own = sae_loss.reconstruction(x, rebuilt, sae_loss.spread(x, centre, "token", 5.0))
    want = [float((x[i] - rebuilt[i]) @ (x[i] - rebuilt[i]) / ((x[i] - centre) @ (x[i] - centre))) for i in range(7)]
    assert own.tolist() == pytest.approx(want, rel=1e-12)
    batch = sae_loss.reconstruction(x, rebuilt, sae_loss.spread(x, centre, "batch", 5.0))
    assert float(batch.mean()) == pytest.approx(
        float(((x - rebuilt) ** 2).mean() / x.var(0, correction=0).mean()), rel=1e-12
    )


def test_a_state_at_the_centre_is_not_divided_by_nothing():
    x = torch.zeros(3, 4)
    assert torch.isfinite(sae_loss.reconstruction(x, x + 1, sae_loss.spread(x, torch.zeros(4), "token", 4.0))).all()
    assert torch.isfinite(sae_loss.reconstruction(x, x + 1, sae_loss.spread(x, torch.zeros(4), "batch", 4.0))).all()


def test_auxiliary_loss_by_the_formula():
    e, pre, w = states(6, 5), states(6, 8, seed=1), states(8, 5, seed=2)
    dead = torch.tensor([True, False, True, True, False, False, True, False])
    found = sae_loss.auxiliary(e, pre, dead, 2, w)
    for n in range(6):
        best = sorted((j for j in range(8) if dead[j]), key=lambda j: -float(pre[n, j]))[:2]
        rebuilt = sum(float(pre[n, j]) * w[j].numpy() for j in best)
        want = np.sum((e[n].numpy() - rebuilt) ** 2) / np.sum(e[n].numpy() ** 2)
        assert float(found[n]) == pytest.approx(want, rel=1e-12)
    assert sae_loss.auxiliary(e, pre, torch.zeros(8, dtype=torch.bool), 2, w).tolist() == [0.0] * 6
    assert sae_loss.auxiliary(torch.zeros_like(e), pre, dead, 2, w).tolist() == [0.0] * 6
    assert torch.isfinite(sae_loss.auxiliary(e, pre, dead, 100, w)).all()  # more than are dead


def test_the_auxiliary_loss_moves_dead_latents_alone():
    e, pre, w = states(6, 5).requires_grad_(), states(6, 8, seed=1).requires_grad_(), states(8, 5, seed=2)
    w.requires_grad_()
    dead = torch.tensor([True, False, True, True, False, False, True, False])
    sae_loss.auxiliary(e, pre, dead, 3, w).sum().backward()
    assert e.grad is None
    assert (pre.grad[:, ~dead] == 0).all()
    assert (w.grad[~dead] == 0).all()
    assert (w.grad[dead].abs().sum(-1) > 0).any()


@pytest.mark.parametrize(("n", "h"), [(20, 6), (6, 20)])
def test_orthogonality_is_the_mean_squared_correlation(n, h):
    r = torch.relu(states(n, h))
    r[:, 1] = 0.7  # constant: correlates with nothing
    r[:, 3] = 0.0
    with np.errstate(invalid="ignore"):
        gram = np.nan_to_num(np.corrcoef(r.T.numpy()))  # centred columns of length 1: correlations
    np.fill_diagonal(gram, 0.0)
    assert float(sae_loss.orthogonality(r)) == pytest.approx((gram**2).sum() / (h * (h - 1)), rel=1e-9)
    assert torch.autograd.gradcheck(sae_loss.orthogonality, states(n, h).requires_grad_())
    assert float(sae_loss.orthogonality(torch.ones(4, 1))) == 0.0


# gradients


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_gradients_against_finite_differences(activation):
    """All weights, in float64; the thresholds learn by a straight-through estimate, see below."""
    made, x = module(activation), states()
    names = [name for name, _ in made.named_parameters() if name != "log_threshold"]
    dead = torch.zeros(9, dtype=torch.bool)
    dead[[2, 5]] = True

    def loss() -> torch.Tensor:
        out = made(x)
        of = sae_loss.spread(x, made.centre, "token", 5.0)
        total = sae_loss.reconstruction(x, out.rebuilt, of)
        # The residual is taken as given, so a fixed one: finite differences would see it move.
        total = total + 0.3 * sae_loss.auxiliary(states(seed=9), out.pre, dead, 1, made.w_dec)
        r = out.values if out.indices is None else sae_loss.spread_out(out.values, out.indices, 9)
        return (total + 0.1 * sae_loss.l1(out.values, of)).mean() + 0.2 * sae_loss.orthogonality(r)

    loss().backward()
    own = dict(made.named_parameters())
    for name in names:
        weight, slope = own[name], own[name].grad
        for at in np.ndindex(*weight.shape):
            kept = float(weight.data[at])
            ends = []
            for step in (1e-6, -1e-6):
                weight.data[at] = kept + step
                ends.append(float(loss().detach()))
            weight.data[at] = kept
            assert float(slope[at]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7), (name, at)


def test_thresholds_learn_the_gradient_of_the_expected_loss():
    """The estimate stands for d/dθ of an expectation over a smooth distribution of p; here over an even one, where the
    expectation can be written down: E[(x − p·1[p > θ])²] and E[1[p > θ]]."""
    low, high, theta, target, bandwidth = 0.0, 4.0, 1.3, 2.0, 0.01
    p = torch.linspace(low, high, 400001, dtype=torch.float64)[:, None]
    threshold = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
    r = sae_loss.jump_relu(p, threshold, bandwidth)
    (target - r).square().mean().backward()
    # d/dθ ∫ = (target² − (target − θ)²)·density
    assert float(threshold.grad) == pytest.approx((target**2 - (target - theta) ** 2) / (high - low), rel=0.02)
    threshold.grad = None
    sae_loss.l0(p, threshold, bandwidth).mean().backward()
    assert float(threshold.grad) == pytest.approx(-1 / (high - low), rel=1e-3)


def test_jump_relu_passes_the_gradient_of_what_it_lets_through():
    p = states(6, 4).requires_grad_()
    threshold = torch.full((4,), 0.4, dtype=torch.float64)
    r = sae_loss.jump_relu(p, threshold, 0.1)
    assert torch.equal(r, torch.where(p > 0.4, p, 0.0))
    r.sum().backward()
    assert torch.equal(p.grad, (p > 0.4).double())


# the beginning, and decoder rows


def test_the_geometric_median_is_not_moved_by_a_few_far_states():
    x = states(400, 3)
    x[:8] += 1000
    found = geometric_median(x)
    assert float(found.norm()) < 0.2
    assert float(x.mean(0).norm()) > 10
    distances = lambda point: float((x - point).norm(dim=-1).sum())  # noqa: E731
    for step in 1e-3 * torch.eye(3, dtype=torch.float64):
        assert distances(found) <= min(distances(found + step), distances(found - step))


def test_most_states_begin_at_the_root_of_d_from_the_centre():
    x = 37 * states(300, 16) + 5
    found = begin(x, SaeSettings(), 3)
    lengths = ((x - found.centre) * found.scale).norm(dim=-1)
    assert float(lengths.median()) == pytest.approx(4.0, rel=1e-5)
    assert torch.allclose(begin(x, SaeSettings(bias="mean"), 3).centre, x.mean(0).float())


def test_a_projected_gradient_keeps_the_length_of_rows():
    made, x = module("topk"), states()
    made.normalise_decoder()  # in float64
    made(x).rebuilt.square().sum().backward()
    made.project_gradient()
    assert (made.w_dec.grad * made.w_dec).sum(-1).abs().max() < 1e-12
    with torch.no_grad():
        made.w_dec.mul_(3.0)
    made.normalise_decoder()
    assert torch.allclose(made.w_dec.norm(dim=-1), torch.ones(9, dtype=torch.float64))
