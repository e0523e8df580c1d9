"""Agreement with kronfluence and curvlinops, of factors and of influence scores, on a tiny model.

What the three call by the same names differs in convention:
- kronfluence sums over tokens, as it is given a summed loss; it takes A over every token that its mask shows (our
  tokens="all"), divides B by tokens, where ours divides by examples (that scales K-FAC's eigenvalues, not the
  eigenvectors, and leaves EK-FAC alone), and with damping None adds 0.1 of the mean eigenvalue, as ours.
- curvlinops' EK-FAC knows no padding and wants the tokens of all rows flattened to one batch of the loss. With the
  reduction "mean" its curvature of rows of n tokens is (1/n) Σ_i G_i G_iᵀ with G_i of the row's summed loss: what ours
  is for sampled labels, and n times ours for the data's labels, where ours is the second moment of ∇L_i itself.
"""

from __future__ import annotations

import logging

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from curate.corpus.render import Rendered
from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.ekfac import Bases, Corrections, Damping, accumulate_corrections, eigenbasis, make_factor, solve
from curate.curvature.fisher import CurvatureSpec
from curate.models.batching import collate
from curate.models.tracked import LayerChoice, tracked_layers
from tests.curvature.oracle import make_rows, names_of, response_loss, weight_gradients
from tests.tiny import tiny_model

QUERIES = make_rows(4, seed=9)


@pytest.fixture(autouse=True)
def _log_level():
    """kronfluence sets the root logger's, for everybody."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


def ours(model, layers, rows, spec):
    """{layer: Factor}."""
    names = names_of(rows)
    cov = accumulate_covariances(model, layers, spec, rows, names, 60, 3, Covariances())
    bases = Bases(
        {reads: eigenbasis(cov.input_factor(reads), reads) for reads in {layer.reads for layer in layers}},
        {layer.name: eigenbasis(cov.output_factor(layer.name), layer.name) for layer in layers},
    )
    got = accumulate_corrections(model, layers, spec, bases, rows, names, 60, 3, Corrections())
    return {
        layer.name: make_factor(
            layer, spec.kind, bases.inputs[layer.reads], bases.outputs[layer.name], got.eigenvalues(layer.name)
        )
        for layer in layers
    }


def gradients(model, layers, rows):
    """{layer: gradients of the summed losses [rows, out, in]}."""
    found = [weight_gradients(model, layers, row.input_ids, response_loss(row)) for row in rows]
    return {layer.name: torch.stack([g[layer.name] for g in found]) for layer in layers}


def scores(factors, queries, rows, damping):
    """Σ over layers of ⟨H⁻¹∇L_query, ∇L_row⟩ [queries, rows]."""
    return sum(
        torch.einsum("qoi,noi->qn", solve(factor, queries[name], damping), rows[name])
        for name, factor in factors.items()
    )


def test_kronfluence(tmp_path):
    pytest.importorskip("kronfluence", reason="a peer, installed by `make test`")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    rows = make_rows(24)
    model = tiny_model("llama", layers=2)
    layers, _ = tracked_layers(model, LayerChoice("all"))

    class Language(Task):
        def compute_train_loss(self, batch, model, sample=False):
            assert not sample
            logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits.float()[:, :-1]
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return [layer.name for layer in layers]

        def get_attention_mask(self, batch):
            return batch["mask"]

    def dataset(rows):
        ids, mask = collate([row.input_ids for row in rows], 3)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            labels[i, max(row.start, 1) : row.end] = ids[i, max(row.start, 1) : row.end]
        return [{"ids": ids[i], "mask": mask[i], "labels": labels[i]} for i in range(len(rows))]

    task = Language()
    analyzer = Analyzer(
        "peer", prepare_model(tiny_model("llama", layers=2), task), task, cpu=True, output_dir=str(tmp_path),
        disable_tqdm=True, log_level=logging.ERROR,
    )  # fmt: skip
    settings = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    analyzer.fit_all_factors("all", dataset(rows), per_device_batch_size=8, factor_args=settings)
    analyzer.compute_pairwise_scores(
        "pairs", "all", dataset(QUERIES), dataset(rows), per_device_query_batch_size=4, per_device_train_batch_size=8,
        score_args=ScoreArguments(damping_factor=None),
    )  # fmt: skip
    theirs = analyzer.load_pairwise_scores("pairs")["all_modules"]

    factors = ours(model, layers, rows, CurvatureSpec(fisher="empirical", tokens="all", reduction="sum"))
    lambdas = analyzer.load_lambda_matrices("all")
    for name, factor in factors.items():
        want = lambdas["lambda_matrix"][name] / lambdas["num_lambda_processed"][name]
        torch.testing.assert_close(factor.eigenvalues.sum(), want.sum(), rtol=1e-3, atol=0)
        # Eigenvalues near zero share an eigenspace, in which every solver chooses its own vectors.
        big = torch.topk(want.flatten(), 50).values
        torch.testing.assert_close(torch.topk(factor.eigenvalues.flatten(), 50).values, big, rtol=0.02, atol=0)
    got = scores(factors, gradients(model, layers, QUERIES), gradients(model, layers, rows), Damping(0.1))
    for mine, other in zip(got, theirs, strict=True):
        assert spearmanr(mine, other).statistic >= 0.99
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_curvlinops():
    pytest.importorskip("curvlinops", reason="a peer, installed by `make test`")
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator

    length, n = 9, 16
    g = torch.Generator().manual_seed(0)
    rows = [Rendered(torch.randint(4, 300, (length,), generator=g).tolist(), 1, length, length) for _ in range(n)]
    model = tiny_model("llama", layers=2).double()
    layers, _ = tracked_layers(model, LayerChoice("attention"))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model("llama", layers=2).double()

        def forward(self, x):
            return self.inner(input_ids=x).logits.flatten(0, 1)

    peer = Logits()
    parameters = [peer.inner.get_submodule(layer.name).weight.requires_grad_(True) for layer in layers]
    ids = torch.tensor([row.input_ids for row in rows])
    operator = EKFACLinearOperator(
        peer, nn.CrossEntropyLoss(reduction="mean"), parameters, [(ids[:, :-1], ids[:, 1:].flatten())],
        fisher_type="empirical", check_deterministic=False, num_data=n,
    )  # fmt: skip
    added = 1e-4
    inverse = KFACInverseLinearOperator(operator, damping=added * (length - 1), use_exact_damping=True)
    queries, train = gradients(model, layers, rows[:3]), gradients(model, layers, rows)
    columns = inverse @ torch.cat([queries[layer.name].flatten(1) for layer in layers], 1).T
    blocks = columns.T.split([layer.size for layer in layers], 1)
    theirs = sum(block @ train[layer.name].flatten(1).T for layer, block in zip(layers, blocks, strict=True))
    factors = ours(model, layers, rows, CurvatureSpec(fisher="empirical", tokens="loss"))
    got = scores(factors, queries, train, Damping(added, "absolute"))
    for mine, other in zip(got, theirs * (length - 1), strict=True):
        assert spearmanr(mine, other).statistic >= 0.99
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
