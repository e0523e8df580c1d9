"""How well a direction separates two classes at every layer, on examples it was not made from.

In: activations [n, L+1, d], labels, and the fold of each example. Out: held-out AUC and separation of each layer, and
the layer to recommend. Knows neither traits nor files.

Each example is projected once, on the unit vector fitted without its fold, and counted from the midpoint between the
two classes of the training part, so that all folds can be ranked together. Every step is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import roc_auc_score

FitLayer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x [m, d], labels [m]) → v [d], not normalised."""


def group_folds(groups: Sequence[Hashable], k: int) -> Int[np.ndarray, " n"] | None:
    """Fold of each example; all examples of a group (a question) share one. None for fewer than two groups."""
    order = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    if len(order) < 2 or k < 2:
        return None
    return np.array([order[g] % min(k, len(order)) for g in groups])


def stratified_folds(labels: Bool[np.ndarray, " n"], k: int) -> Int[np.ndarray, " n"] | None:
    """Fold of each example, both classes dealt out evenly. None when a class has fewer than two members."""
    k = min(k, int(labels.sum()), int((~labels).sum()))
    if k < 2:
        return None
    fold = np.empty(len(labels), dtype=np.int64)
    for side in (labels, ~labels):
        fold[side] = np.arange(int(side.sum())) % k
    return fold


def layer_profile(
    activations: Float[np.ndarray, "n rows d"],
    labels: Bool[np.ndarray, " n"],
    fold: Int[np.ndarray, " n"] | None,
    vectors: Float[np.ndarray, "rows d"],
    fit: FitLayer,
) -> list[dict[str, Any]]:
    """One dict a layer: layer, norm (‖v‖ of `vectors`), auc and separation (Cohen's d), both held-out; None = unknown.

    Layers whose vector is NaN or zero get None for all three.
    """
    out: list[dict[str, Any]] = []
    for layer, v in enumerate(vectors.astype(np.float64)):
        norm = float(np.linalg.norm(v))
        known = math.isfinite(norm) and norm > 0
        auc, separation = None, None
        if known and fold is not None:
            auc, separation = _held_out(activations[:, layer], labels, fold, fit)
        out.append({"layer": layer, "norm": norm if known else None, "auc": auc, "separation": separation})
    return out


def recommend(profile: Sequence[dict[str, Any]]) -> tuple[int | None, str]:
    """The layer to use, and why: best held-out AUC in the middle half ⌈L/4⌉..⌊3L/4⌋; ties go to the better separation,
    then to the lower layer. Early layers hold words rather than traits, late ones the next token. Without held-out
    figures: the layer nearest to the middle. None when no layer has a direction.
    """
    last = len(profile) - 1
    usable = [p for p in profile if p["norm"] is not None]
    middle = [p for p in usable if math.ceil(last / 4) <= p["layer"] <= 3 * last // 4]
    pool = middle or [p for p in usable if p["layer"] > 0] or usable
    if not pool:
        return None, "no layer has a direction"
    scored = [p for p in pool if p["auc"] is not None]
    if not scored:
        best = min(pool, key=lambda p: (abs(p["layer"] - last / 2), p["layer"]))
        return best["layer"], "nearest to the middle; too few questions or examples to hold any out"
    best = max(scored, key=lambda p: (round(p["auc"], 4), round(p["separation"] or 0.0, 4), -p["layer"]))
    return best["layer"], "best held-out AUC of the middle half" if middle else "best held-out AUC"


def _held_out(
    x: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, " n"], fold: Int[np.ndarray, " n"], fit: FitLayer
) -> tuple[float | None, float | None]:
    projected = np.full(len(x), np.nan)
    for k in np.unique(fold):
        train, test = fold != k, fold == k
        if labels[train].all() or not labels[train].any():
            continue  # with groups, one side may lie in this fold alone
        xt, yt = x[train].astype(np.float64), labels[train]
        v = np.asarray(fit(xt, yt), dtype=np.float64)
        norm = np.linalg.norm(v)
        if not norm > 0:
            continue
        v /= norm
        middle = (xt[yt].mean(axis=0) + xt[~yt].mean(axis=0)) / 2
        projected[test] = (x[test] - middle) @ v
    seen = ~np.isnan(projected)
    p, y = projected[seen], labels[seen]
    if y.all() or not y.any():
        return None, None
    pooled = math.sqrt((_sum_squares(p[y]) + _sum_squares(p[~y])) / max(len(p) - 2, 1))
    gap = float(p[y].mean() - p[~y].mean())
    return float(roc_auc_score(y, p)), gap / pooled if pooled > 0 else None


def _sum_squares(values: np.ndarray) -> float:
    return float(((values - values.mean()) ** 2).sum())
