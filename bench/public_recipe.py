"""The public recipe for influence on language models, our own writing of it: the reference that scores are timed and
checked against.

One example at a time, padded to 1,536 tokens, float32; the whole model with its head, logits of every position; EK-FAC
by curvlinops' EKFACLinearOperator and its inverse with exact damping; for every training row the full gradient of every
tracked weight, and its inner product with H⁻¹∇f (paper A, appendix B). In: a model, tracked layers, tokenised rows.
Out: factors, a test vector, scores. Knows nothing of curate's curvature and scoring.

Conventions that differ from curate's: A is the mean over rows of the mean over *all* positions of a row, prompt and
padding included (curate: tokens that the loss reaches); with sampled labels and the mean loss, a row of n tokens weighs
1/n² Σ F_t (curate: 1/n Σ F_t, the Fisher of the mean); one damping for all layers (curate: by default relative to each
layer's mean eigenvalue). Labels are sampled at response positions, as in curate.
"""

from __future__ import annotations

import argparse
import time
from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bench import demo_rows
from bench.common import emit, machine
from bench.real_data import SETS
from bench.real_rows import DATA, mixed
from curate.corpus.render import Rendered, Renderer
from curate.curvature.queries import render_queries
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.tracked import LayerChoice, TrackedLayer, tracked_layers

BENCH = "public_recipe"
PAD_TO = 1536
DAMPING = 1e-3


def batch_of(row: Rendered, pad_to: int, device: torch.device) -> dict[str, Tensor]:
    """One row padded on the right to `pad_to` tokens (0: not padded). `labels` are -100 where there is no loss."""
    ids = row.input_ids[: row.end]
    fill = max(0, pad_to - len(ids))
    first = max(row.start, 1)
    labels = [-100] * first + ids[first:] + [-100] * fill
    made = {"input_ids": ids + [0] * fill, "attention_mask": [1] * len(ids) + [0] * fill, "labels": labels}
    return {name: torch.tensor([values], device=device) for name, values in made.items()}


def response_logits(model: nn.Module, batch: Any) -> Float[Tensor, "positions vocab"]:
    """Logits that predict the response: of all positions, then chosen, as the usual loss does."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits[:, :-1][batch["labels"][:, 1:] != -100]


def targets(batch: Any) -> Tensor:
    """The tokens that `response_logits` predicts, [positions]."""
    after = batch["labels"][:, 1:]
    return after[after != -100]


class _ResponseModel(nn.Module):
    """The model as curvlinops wants it: one argument, logits of two dimensions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return response_logits(self.model, batch)


@dataclass(frozen=True)
class RecipeSpec:
    """`reduction`: L is the mean or the sum over response tokens. `damping` is absolute, on the scale of the mean over
    rows. `fisher`: labels sampled from the model ("mc"), or those of the data ("empirical")."""

    pad_to: int = PAD_TO
    reduction: Literal["mean", "sum"] = "mean"
    fisher: Literal["mc", "empirical"] = "mc"
    damping: float = DAMPING


class PublicRecipe:
    """
    Args:
        model: float32; the tracked weights are made to require gradients.
        layers: from `tracked_layers`.

    Raises:
        ImportError: curvlinops is not installed (`pip install --no-deps curvlinops-for-pytorch backpack-for-pytorch
            einconv linear_operator opt-einsum`; it runs without torchvision).
    """

    def __init__(self, model: Any, layers: Sequence[TrackedLayer], spec: RecipeSpec) -> None:
        self.model, self.layers, self.spec = model, list(layers), spec
        self.weights: list[nn.Parameter] = [model.get_submodule(layer.name).weight for layer in layers]
        for weight in self.weights:
            weight.requires_grad_(True)
        self.operator: Any = None
        self._rows = 0

    def fit(self, rows: Sequence[Rendered]) -> None:
        """Kronecker factors, eigenvectors and corrected eigenvalues over `rows`."""
        from curvlinops import EKFACLinearOperator

        data = []
        for row in rows:
            batch = batch_of(row, self.spec.pad_to, self.model.device)
            data.append((UserDict(batch), targets(batch)))
        # With one loss term an example and batches of one, curvlinops' scaling for "mean" is 1/N, and none for "sum".
        self.operator = EKFACLinearOperator(
            _ResponseModel(self.model),
            nn.CrossEntropyLoss(reduction=self.spec.reduction),
            list(self.weights),
            data,
            check_deterministic=False,
            fisher_type=self.spec.fisher,
            num_per_example_loss_terms=1,
            num_data=len(rows),
            batch_size_fn=lambda batch: 1,
            separate_weight_and_bias=True,
        )
        self._rows = len(rows)
        self.operator.compute_kronecker_factors()
        self.operator.compute_eigenvalue_correction()

    def gradient(self, row: Rendered) -> list[Tensor]:
        """∇L of one row for every tracked weight."""
        batch = batch_of(row, self.spec.pad_to, self.model.device)
        loss = F.cross_entropy(response_logits(self.model, batch), targets(batch), reduction=self.spec.reduction)
        return list(torch.autograd.grad(loss, self.weights))

    def test_vector(self, queries: Sequence[Rendered]) -> list[Tensor]:
        """H⁻¹∇L, averaged over `queries`, for every tracked weight; H = I where nothing was fitted."""
        mean = [torch.zeros_like(w) for w in self.weights]
        for query in queries:
            for total, part in zip(mean, self.gradient(query), strict=True):
                total += part / len(queries)
        if self.operator is None:
            return mean
        from curvlinops import KFACInverseLinearOperator

        scale = self._rows if self.spec.reduction == "sum" else 1
        inverse = KFACInverseLinearOperator(self.operator, damping=self.spec.damping * scale, use_exact_damping=True)
        return [part * scale for part in inverse @ mean]

    def scores(self, rows: Sequence[Rendered], test_vector: Sequence[Tensor]) -> np.ndarray:
        """⟨∇L(row), H⁻¹∇L(queries)⟩, float64 [n]: how much training on the row raises the queries' likelihood."""
        out = np.empty(len(rows))
        for i, row in enumerate(rows):
            parts = zip(self.gradient(row), test_vector, strict=True)
            out[i] = sum(float((g.double() * s.double()).sum()) for g, s in parts)
        return out


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.public_recipe", description=__doc__)
    p.add_argument("--data", default=DATA, type=type(DATA), help="folder of the real data")
    p.add_argument("--set", default="gsm8k", choices=list(SETS))
    p.add_argument("--rows", type=int, default=4, help="rows to score")
    p.add_argument("--fit-rows", type=int, default=2, help="rows to fit the factors on")
    p.add_argument("--pad-to", type=int, default=PAD_TO)
    p.add_argument("--model", default=demo_rows.MODEL)
    p.add_argument("--adapter", default=None, help="a LoRA adapter, merged")
    p.add_argument("--last", type=int, default=20, help="track the attention of the blocks below this one")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    spec = ModelSpec(args.model, args.adapter, dtype="float32")
    renderer = Renderer(load_tokenizer(spec), args.pad_to or PAD_TO)
    data = mixed(args.set, args.data, args.fit_rows + args.rows, 1, renderer)
    model = load_model(spec)
    layers, _ = tracked_layers(model, LayerChoice(last=args.last))
    recipe = PublicRecipe(model, layers, RecipeSpec(args.pad_to))
    settings = {"set": args.set, "fit_rows": args.fit_rows, "rows": args.rows, "pad_to": args.pad_to, **machine()}
    settings["tokens"] = sum(r.end for r in data.rendered)

    def timed(metric: str, unit: str, run: Any, n: int) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        made = run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        emit(BENCH, metric, {"cpu": cpu / n, "wall": wall / n}, unit, settings=settings)
        return made

    timed("fit", "s/row", lambda: recipe.fit(data.rendered[: args.fit_rows]), args.fit_rows)
    queries = [q.positive for q in render_queries(data.queries, renderer)]
    vector = timed("test_vector", "s", lambda: recipe.test_vector(queries), 1)
    timed("score", "s/row", lambda: recipe.scores(data.rendered[args.fit_rows :], vector), args.rows)


if __name__ == "__main__":
    main()
