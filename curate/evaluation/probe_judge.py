"""A judge that is a linear probe: 100 × the probability of a logistic regression on the answer's mean activation.

Fitting, in: activations [n, L+1, d] of labelled answers. Out: a ProbeHead. Judging, in: pairs and a model to read them
with (the base model, whatever model wrote the answers). Out: JudgeScores. Knows no cluster, no cache and no trait: the
template says nothing to it.

P = σ(a·(w·x̄ + c) + b), x̄ the mean of layer l over the response tokens (METHODS §4). w, c: logistic regression on
standardised activations. a, b: Platt's calibration on held-out folds, as a regression with more features than rows
separates its own rows and is then certain of everything.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import safetensors
import safetensors.numpy
import torch
from jaxtyping import Float, Int
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from curate.concepts.layer_profile import group_folds, stratified_folds
from curate.concepts.probe import linear_probe
from curate.corpus.example import Example, Message
from curate.corpus.render import Rendered, Renderer
from curate.errors import BadRow, ConceptError
from curate.evaluation.judge import JudgeScore
from curate.models.batching import collate, token_batches
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.pooling import response_mean
from curate.models.tap import LayerTap


@dataclass(frozen=True)
class ProbeHead:
    """P(x̄) = σ(weight·x̄ + bias) at `layer`. `auc`: on held-out folds; None where none could be held out."""

    layer: int
    weight: Float[np.ndarray, " d"]
    bias: float
    auc: float | None

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        tensors = {
            "weight": np.asarray(self.weight, "<f8"),
            "bias": np.array([self.bias], "<f8"),
            "layer": np.array([self.layer], "<i8"),
            "auc": np.array([np.nan if self.auc is None else self.auc], "<f8"),
        }
        return safetensors.numpy.save(tensors)

    @staticmethod
    def from_bytes(data: bytes) -> ProbeHead:
        """
        Raises:
            ConceptError: not a file of `to_bytes`.
        """
        try:
            t = safetensors.numpy.load(data)
            auc = float(t["auc"][0])
            head = ProbeHead(int(t["layer"][0]), t["weight"], float(t["bias"][0]), None if np.isnan(auc) else auc)
        except (safetensors.SafetensorError, KeyError, IndexError) as error:
            raise ConceptError(f"this is no probe of a judge ({type(error).__name__}: {error}); delete it") from error
        return head


def fit_head(
    activations: Float[np.ndarray, "n rows d"],
    labels: Sequence[Any],
    positive: Hashable,
    groups: Sequence[Hashable] | None = None,
    layer: int | None = None,
    folds: int = 5,
    regularisation: float = 1.0,
) -> ProbeHead:
    """Fit the probe at `layer`, or at the layer of the middle half that separates held-out rows best.

    Args:
        groups: rows of one group (answers to one question) are held out together.

    Raises:
        ConceptError: one class only, too few rows to hold any out, activations that are not finite, no such layer.
    """
    layers = None if layer is None else [layer]
    found = linear_probe(activations, labels, "judge", {}, positive, groups, layers, folds, regularisation)
    chosen = layer if layer is not None else found.layer
    assert chosen is not None  # linear_probe has refused activations without a usable layer
    x = np.asarray(activations[:, chosen], dtype=np.float64)
    y = np.array([value == positive for value in labels])
    fold = held_out_folds(labels, positive, groups, folds)
    splits = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in np.unique(fold)]
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=1.0 / regularisation, max_iter=2000))
    fitted = CalibratedClassifierCV(plain, method="sigmoid", cv=splits, ensemble=False).fit(x, y)
    scaler, regression = (step for _, step in fitted.calibrated_classifiers_[0].estimator.steps)
    slope = fitted.calibrated_classifiers_[0].calibrators[0]  # scikit-learn's σ(−(a·f + b))
    w = regression.coef_[0] / scaler.scale_
    c = float(regression.intercept_[0] - w @ scaler.mean_)
    auc = next(p["auc"] for p in found.meta["profile"] if p["layer"] == chosen)
    return ProbeHead(chosen, -slope.a_ * w, float(-slope.a_ * c - slope.b_), auc)


def held_out_folds(
    labels: Sequence[Any], positive: Hashable, groups: Sequence[Hashable] | None = None, folds: int = 5
) -> Int[np.ndarray, " n"]:
    """The fold in which each row is held out.

    Raises:
        ConceptError: one class only, or too few rows or groups: without a fold, both classes are left in every case.
    """
    y = np.array([value == positive for value in labels])
    fold = stratified_folds(y, folds) if groups is None else group_folds(groups, folds)
    if fold is None or not all(0 < y[fold != k].sum() < (fold != k).sum() for k in np.unique(fold)):
        raise ConceptError(
            f"the judge's probe has {int(y.sum())} rows with the label {positive!r} and {int((~y).sum())} without, too "
            f"few (or in too few groups) to hold any out; give more labelled rows"
        )
    return fold


class ProbeJudge:
    """Reads pairs with `model` up to the probe's layer. `token_budget`: padded tokens of a batch."""

    reads_template: ClassVar[bool] = False

    def __init__(self, model: ModelSpec, head: ProbeHead, max_tokens: int, token_budget: int) -> None:
        """
        Raises:
            ModelError: the model cannot be loaded, or has no such layer.
        """
        self.head, self.budget = head, token_budget
        self.renderer = Renderer(load_tokenizer(model), max_tokens)
        self.model = load_model(model)
        self.tap = LayerTap(self.model, [head.layer])
        self.weight = torch.from_numpy(np.asarray(head.weight, np.float64))

    def __call__(self, pairs: Sequence[tuple[str, str]], prompt_template: str = "") -> list[JudgeScore]:
        """One JudgeScore a pair, in order; a pair that cannot be rendered, or is over-long, has none and the reason."""
        out: list[JudgeScore | None] = [None] * len(pairs)
        rendered: list[tuple[int, Rendered]] = []
        for i, (question, answer) in enumerate(pairs):
            try:
                if not answer.strip():
                    raise BadRow("the answer is empty")
                messages = (Message("user", question), Message("assistant", answer))
                rendered.append((i, self.renderer.render(Example("", i, messages))))
            except BadRow as bad:
                out[i] = JudgeScore(None, reason=bad.reason)
        for batch in token_batches([len(r.input_ids) for _, r in rendered], self.budget):
            picked = [rendered[k] for k in batch]
            ids, _ = collate([r.input_ids for _, r in picked], 0)
            state = self.tap(ids.to(self.model.device))[self.head.layer]
            mean = response_mean(state, [r.start for _, r in picked], [r.stop for _, r in picked]).double().cpu()
            for (i, _), p in zip(picked, torch.sigmoid(mean @ self.weight + self.head.bias).tolist(), strict=True):
                known = np.isfinite(p)
                out[i] = JudgeScore(100.0 * p) if known else JudgeScore(None, reason="the activations are not finite")
        return [s for s in out if s is not None]
