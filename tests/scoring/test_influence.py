"""Influence scorers through the shared pass: columns, one pass for all methods, the finetuned model, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from curate.errors import ConfigError, CurvatureError
from curate.models.tracked import LayerChoice
from curate.scoring.directional.make import make_backend
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass
from tests.scoring.directional.oracle import exact, random_vector
from tests.scoring.rows import make_concept, make_examples, render
from tests.tiny import tiny_model

EXAMPLES = make_examples()
RENDERED = render(EXAMPLES)


@pytest.fixture(scope="module")
def tuned():
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def vectors(tuned):
    # Behaviours of one name in two methods, layers of the one among those of the other.
    return {
        "influence_function": random_vector(tuned, ["loss", "contrast"], seed=1),
        "concept_influence": random_vector(tuned, ["trait.L2"], LayerChoice(last=2), seed=2),
        "gradient_product": random_vector(tuned, ["loss"], seed=3, rank=2),
    }


def test_all_methods_in_one_pass_beside_the_base_model(tuned, vectors, monkeypatch):
    settings = {"vector_filter": {"layers": [1]}, **{name: {} for name in vectors}}
    scorers = make_scorers(settings, [make_concept()], test_vectors=vectors)
    shared = SharedPass(tiny_model("llama"), scorers, max_tokens=400, tuned=tuned)
    found = shared.run(EXAMPLES, RENDERED)
    assert list(found.columns) == shared.columns() == [
        "vector_filter.trait.L1",
        "influence_function.loss",
        "influence_function.contrast",
        "concept_influence.trait.L2",
        "gradient_product.loss",
    ]  # fmt: skip
    assert len(shared._joint) == 1
    for name, vector in vectors.items():
        scores = np.stack([found.columns[f"{name}.{q}"] for q in vector.names], axis=1)
        expected = exact(tuned, vector, RENDERED)[0]
        np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())
    alone = SharedPass(tiny_model("llama"), scorers[:1], max_tokens=400).run(EXAMPLES, RENDERED)
    np.testing.assert_array_equal(found.columns["vector_filter.trait.L1"], alone.columns["vector_filter.trait.L1"])
    # What takes gradients has a budget of its own: a row a batch, where the base model's pass is as before.
    slow = SharedPass(tiny_model("llama"), scorers, max_tokens=400, tuned=tuned, gradient_tokens=1)
    again = slow.run(EXAMPLES, RENDERED)
    assert again.stats.batches == alone.stats.batches + len(EXAMPLES)
    for column, values in again.columns.items():
        np.testing.assert_allclose(values, found.columns[column], atol=1e-4 * np.abs(values).max())
    assert found.stats.rows == len(EXAMPLES)
    assert found.stats.flops > 2 * alone.stats.flops
    monkeypatch.setattr("curate.scoring.shared_pass._WINDOW", 3)
    windows = shared.run(EXAMPLES, RENDERED)
    for name, values in windows.columns.items():
        np.testing.assert_allclose(values, found.columns[name], rtol=1e-3, atol=1e-4)


def test_settings_that_differ_get_passes_of_their_own(tuned, vectors):
    settings = {"influence_function": {"backend": "contraction"}, "gradient_product": {"reduction": "sum"}}
    scorers = make_scorers(settings, test_vectors=vectors)
    shared = SharedPass(None, scorers, tuned=tuned)  # no base model: nobody reads its activations
    found = shared.run(EXAMPLES, RENDERED).columns
    assert len(shared._joint) == 2
    expected = exact(tuned, vectors["gradient_product"], RENDERED, "sum")[0][:, 0]
    np.testing.assert_allclose(found["gradient_product.loss"], expected, atol=1e-4 * np.abs(expected).max())


def test_the_model_itself_where_none_is_finetuned(tuned, vectors):
    scorers = make_scorers({"concept_influence": {}}, test_vectors=vectors)
    one, other = SharedPass(tuned, scorers), SharedPass(None, scorers, tuned=tuned)
    for name, values in one.run(EXAMPLES, RENDERED).columns.items():
        np.testing.assert_array_equal(values, other.run(EXAMPLES, RENDERED).columns[name])


def test_a_header_says_columns_and_recipe(vectors):
    settings = {name: {} for name in vectors}
    from_headers = make_scorers(settings, test_vectors={name: v.header for name, v in vectors.items()})
    from_vectors = make_scorers(settings, test_vectors=vectors)
    assert [s.columns() for s in from_headers] == [s.columns() for s in from_vectors]
    assert [s.fingerprint() for s in from_headers] == [s.fingerprint() for s in from_vectors]
    assert len({s.fingerprint()["test_vector"] for s in from_headers}) == 3
    assert all(s.needs().model and s.needs().tuned and not s.needs().base for s in from_headers)


def test_a_row_whose_loss_is_not_finite_scores_nan(tuned, vectors):
    broken = copy.deepcopy(tuned)
    ids = RENDERED[3].input_ids
    only = next(i for i in ids if all(i not in r.input_ids for k, r in enumerate(RENDERED) if k != 3))
    with torch.no_grad():
        broken.get_input_embeddings().weight[only] = float("nan")
    scorers = make_scorers({"influence_function": {}}, test_vectors=vectors)
    for values in SharedPass(broken, scorers).run(EXAMPLES, RENDERED).columns.values():
        assert np.isnan(values).tolist() == [i == 3 for i in range(len(EXAMPLES))]


def test_refusals(tuned, vectors):
    with pytest.raises(ConfigError, match="'influence_function' needs a test vector"):
        make_scorers({"influence_function": {}})
    with pytest.raises(ConfigError, match="backend is 'foward'; did you mean 'forward'"):
        make_scorers({"influence_function": {"backend": "foward"}}, test_vectors=vectors)
    with pytest.raises(ConfigError, match=r"reduction is 'men'; did you mean 'mean'"):
        make_scorers({"influence_function": {"reduction": "men"}}, test_vectors=vectors)
    scorers = make_scorers({"influence_function": {}}, test_vectors=vectors)
    with pytest.raises(ConfigError, match="'influence_function' needs a model"):
        SharedPass(None, scorers)
    with pytest.raises(ConfigError, match="need tokenised rows"):
        SharedPass(tuned, scorers).run(EXAMPLES)
    with pytest.raises(CurvatureError, match="which GPT2LMHeadModel has not"):
        SharedPass(tiny_model("gpt2"), scorers)
    headers = {name: v.header for name, v in vectors.items()}
    with pytest.raises(ConfigError, match="header of a test vector alone"):
        SharedPass(tuned, make_scorers({"influence_function": {}}, test_vectors=headers))


@pytest.mark.parametrize("queries", [1, 16])
def test_auto_takes_a_backend_that_fits(tuned, queries):
    names = [f"q{i}" for i in range(queries)]
    auto = make_backend("auto", tuned, random_vector(tuned, names, seed=4))
    assert auto.name in ("contraction", "forward")
    assert make_backend("auto", tuned, random_vector(tuned, names, seed=4), by_block=True).name == "contraction"
