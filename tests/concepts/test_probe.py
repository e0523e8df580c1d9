"""Linear probes against scikit-learn's own pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from curate.concepts.concept import direction
from curate.concepts.probe import linear_probe
from curate.errors import ConceptError

MODEL = {"name": "tiny", "digest": "ab"}


def data(n=120, rows=5, d=12, seed=0, strong=2):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    x = rng.normal(size=(n, rows, d)) * rng.uniform(0.01, 100, size=d)  # features of very different scales
    x[:, strong, 3] += 2.0 * x[:, strong, 3].std() * y
    x[:, 1, 5] += 0.5 * x[:, 1, 5].std() * y
    return x, y


def test_projections_rank_as_the_pipeline_does():
    x, y = data()
    c = linear_probe(x, y, "bad", MODEL)
    assert (c.name, c.layer, c.method, c.pooling) == ("bad", 2, "probe.logistic_regression", "response_mean")
    for layer in range(5):
        pipe = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[:, layer], y)
        expected = pipe.decision_function(x[:, layer])
        got = x[:, layer] @ c.vectors[layer].astype(np.float64)
        np.testing.assert_allclose(got - got.mean(), expected - expected.mean(), rtol=1e-3, atol=1e-3)
    assert (c.meta["examples"], c.meta["positive"], c.meta["negative"]) == (120, y.sum(), (~y).sum())
    assert c.meta["not_converged_layers"] == []


def test_the_sign_is_more_of_the_trait():
    x, y = data()
    v = direction(linear_probe(x, y, "bad", MODEL), 2)
    assert (x[y, 2] @ v).mean() > (x[~y, 2] @ v).mean()
    flipped = direction(linear_probe(x, ~y, "good", MODEL), 2)
    np.testing.assert_allclose(flipped, -v, atol=1e-4)


def test_held_out_auc_is_near_scikit_learns():
    x, y = data(n=300)
    groups = np.arange(300) // 3
    c = linear_probe(x, y, "bad", MODEL, groups=groups.tolist())
    for layer in range(5):
        pipe = make_pipeline(StandardScaler(), LogisticRegression())
        p = cross_val_predict(pipe, x[:, layer], y, groups=groups, cv=GroupKFold(5), method="decision_function")
        assert c.meta["profile"][layer]["auc"] == pytest.approx(roc_auc_score(y, p), abs=0.06)


def test_labels_may_be_words_and_layers_a_subset():
    x, y = data()
    words = ["insecure" if v else "secure" for v in y]
    c = linear_probe(x, words, "insecure", MODEL, positive="insecure", layers=[2, 3])
    assert c.layers() == [2, 3]
    np.testing.assert_allclose(c.vectors[2], linear_probe(x, y, "b", MODEL).vectors[2], rtol=1e-5)
    assert c.meta["positive_label"] == "insecure"
    gap = x.copy()
    gap[:, 0] = np.nan  # a layer that was not computed
    assert linear_probe(gap, y, "b", MODEL).layers() == [1, 2, 3, 4]


def test_few_examples_give_a_vector_without_held_out_figures():
    x, y = data()
    pick = [np.flatnonzero(y)[0], *np.flatnonzero(~y)[:3]]
    c = linear_probe(x[pick], y[pick], "b", MODEL)
    assert {p["auc"] for p in c.meta["profile"]} == {None}


def test_refusals():
    x, y = data()
    for labels, positive, message in (
        (np.zeros(120, bool), True, "no example has the label True"),
        (np.ones(120, bool), True, "all 120 examples have the label True"),
        (["secure", "insecure"] * 60, "insecur", "no example has the label 'insecur'; did you mean 'insecure'"),
        (y[:100], True, "120 activations, 100 labels"),
    ):
        with pytest.raises(ConceptError, match=message):
            linear_probe(x, labels, "p", MODEL, positive=positive)
    with pytest.raises(ConceptError, match="2 groups; their numbers must agree"):
        linear_probe(x, y, "p", MODEL, groups=[1, 2])
    with pytest.raises(ConceptError, match="no layer 7; the activations have layers 0 to 4"):
        linear_probe(x, y, "p", MODEL, layers=[7])
    with pytest.raises(ConceptError, match=r"expected .examples, layers"):
        linear_probe(x[:, 0], y, "p", MODEL)
    with pytest.raises(ConceptError, match="regularisation is 0"):
        linear_probe(x, y, "p", MODEL, regularisation=0)
    x[3, 1, 2] = np.nan
    with pytest.raises(ConceptError, match="1 of 120 examples have NaN or infinite activations at layer 1"):
        linear_probe(x, y, "p", MODEL)
    x[:, 1] = np.nan
    with pytest.raises(ConceptError, match=r"120 of 120 examples have NaN .* at layer 1"):
        linear_probe(x, y, "p", MODEL, layers=[1])
