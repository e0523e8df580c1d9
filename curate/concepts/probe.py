"""Linear probe: v_l = normal of a logistic regression on response-mean activations of labelled examples.

In: activations [n, L+1, d] and a class for each example. Out: a Concept with its held-out layer profile. Knows neither
model nor corpus. The regression runs on standardised features (x - mean) / sd; its weights w are folded back,
v = w / sd, so that v·x ranks plain activations as the probe does.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from curate.concepts.concept import Concept
from curate.concepts.layer_profile import FitLayer, group_folds, layer_profile, recommend, stratified_folds
from curate.errors import ConceptError, near


def linear_probe(
    activations: Float[np.ndarray, "n rows d"],
    labels: Sequence[Any] | np.ndarray,
    name: str,
    model: Mapping[str, Any],
    positive: Hashable = True,
    groups: Sequence[Hashable] | None = None,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    regularisation: float = 1.0,
) -> Concept:
    """Fit one probe a layer.

    Args:
        labels: a value for each example; `positive` is the one that shows the trait, all others count as not.
        groups: examples of one group (the same prompt, say) are never split between fitting and held-out part.
        layers: rows to fit (default all); the others become NaN. A layer that is NaN throughout is left out.
        regularisation: 1/C of scikit-learn's LogisticRegression (L2).

    Raises:
        ConceptError: one class only, sizes that differ, NaN or infinite activations, a layer that is not there.
    """
    x = np.asarray(activations)
    y = np.array([value == positive for value in labels], dtype=bool)
    _check(x, y, labels, name, positive, groups)
    rows = range(x.shape[1]) if layers is None else sorted(set(layers))
    wrong = [layer for layer in rows if not 0 <= layer < x.shape[1]]
    if wrong:
        raise ConceptError(f"probe {name!r}: no layer {wrong[0]}; the activations have layers 0 to {x.shape[1] - 1}")
    fit = _fitter(regularisation)
    vectors = np.full(x.shape[1:], np.nan, dtype=np.float32)
    slow = []
    for layer in rows:
        finite = np.isfinite(x[:, layer])
        if not finite.any() and layers is None:
            continue
        if not finite.all():
            bad = int((~finite.all(axis=1)).sum())
            raise ConceptError(
                f"probe {name!r}: {bad} of {len(x)} examples have NaN or infinite activations at layer {layer}; leave "
                f"them out, or compute activations in float32"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            vectors[layer] = fit(x[:, layer].astype(np.float64), y)
        if any(issubclass(w.category, ConvergenceWarning) for w in caught):
            slow.append(layer)
    fold = stratified_folds(y, folds) if groups is None else group_folds(groups, folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told above, for the fit that is kept
        profile = layer_profile(x, y, fold, vectors, fit)
    best, why = recommend(profile)
    return Concept(
        name=name,
        vectors=vectors,
        layer=best,
        model=dict(model),
        method="probe.logistic_regression",
        pooling="response_mean",
        meta={
            "examples": len(y),
            "positive": int(y.sum()),
            "negative": int((~y).sum()),
            "positive_label": str(positive),
            "regularisation": regularisation,
            "folds": folds,
            "grouped": groups is not None,
            "not_converged_layers": slow,
            "profile": profile,
            "recommended_because": why,
        },
    )


def _check(
    x: np.ndarray,
    y: np.ndarray,
    labels: Sequence[Any] | np.ndarray,
    name: str,
    positive: Hashable,
    groups: Sequence[Hashable] | None,
) -> None:
    if x.ndim != 3:
        raise ConceptError(f"probe {name!r}: activations have the shape {x.shape}, expected [examples, layers + 1, d]")
    if len(x) != len(y) or (groups is not None and len(groups) != len(y)):
        sizes = f"{len(x)} activations, {len(y)} labels" + (f", {len(groups)} groups" if groups is not None else "")
        raise ConceptError(f"probe {name!r}: {sizes}; their numbers must agree")
    if not y.any():
        seen = sorted({str(v) for v in labels})
        raise ConceptError(
            f"probe {name!r}: no example has the label {positive!r}{near(str(positive), seen)}; a probe needs examples "
            f"with and without it"
        )
    if y.all():
        raise ConceptError(
            f"probe {name!r}: all {len(y)} examples have the label {positive!r}; a probe needs examples without it too"
        )


def _fitter(regularisation: float) -> FitLayer:
    if not regularisation > 0:
        raise ConceptError(f"regularisation is {regularisation}; it must be greater than 0")

    def fit(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
        scaler = StandardScaler().fit(x)
        probe = LogisticRegression(C=1.0 / regularisation, max_iter=2000)
        probe.fit(scaler.transform(x), labels)
        return np.asarray(probe.coef_[0] / scaler.scale_)

    return fit
