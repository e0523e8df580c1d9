"""Settings become scorers, and a wrong setting says what was meant."""

from __future__ import annotations

import json

import pytest

from curate.errors import ConfigError
from curate.scoring.registry import SCORERS, make_scorers
from tests.scoring.directional.oracle import random_vector
from tests.scoring.rows import make_concept
from tests.tiny import tiny_model

CONCEPT = make_concept()


def test_order_and_layers():
    scorers = make_scorers({"random": None, "vector_filter": {"layers": [1, 2]}, "activation_norm": {}}, [CONCEPT])
    assert [s.name for s in scorers] == ["random", "vector_filter", "activation_norm"]
    assert [s.primary for s in scorers] == ["random", "vector_filter.trait.L1", "activation_norm.L2"]


def test_default_layers_apply_where_none_are_given():
    settings = {"vector_filter": {"layers": None}, "projection_difference": {"layers": 3}, "activation_norm": {}}
    scorers = make_scorers(settings, [CONCEPT], default_layers=[1])
    assert [s.columns() for s in scorers] == [
        ["vector_filter.trait.L1"],
        ["projection_difference.trait.L3"],
        ["activation_norm.L1"],
    ]


def test_every_fingerprint_is_json():
    queries = {"queries": ["a good plan"]}
    given = {"bm25": queries, "known_label": {"positive": "bad"}}
    settings = {
        name: given.get(name, {}) for name in SCORERS if name not in ("embedding_similarity", "latent_activation")
    }
    vector = random_vector(tiny_model("llama"), ["loss"])
    methods = ("influence_function", "concept_influence", "gradient_product", "gradient_cosine")
    vectors = dict.fromkeys(methods, vector.header)
    for scorer in make_scorers(settings, [CONCEPT], test_vectors=vectors):
        assert json.loads(json.dumps(scorer.fingerprint())) == scorer.fingerprint()
        assert scorer.fingerprint()["method"] == scorer.name


def test_queries_from_a_file(tmp_path):
    listed = make_scorers({"bm25": {"queries": ["good plan", "so true"]}})[0].fingerprint()
    (tmp_path / "q.txt").write_text("good plan\n\nso true\n")
    (tmp_path / "q.json").write_text('["good plan", {"text": "so true"}]')
    (tmp_path / "q.jsonl").write_text(
        '"good plan"\n{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "so true"}]}\n'
    )
    for name in ("q.txt", "q.json", "q.jsonl"):
        assert make_scorers({"bm25": {"queries_url": str(tmp_path / name)}})[0].fingerprint() == listed
    both = {"queries": None, "queries_url": str(tmp_path / "q.txt"), "reference_url": str(tmp_path / "q.txt")}
    assert make_scorers({"bm25": both})[0].fingerprint() == listed


def test_none_means_the_default_but_for_options_that_take_none():
    queries = ["the good plan"]
    default = make_scorers({"bm25": {"queries": queries}})[0].fingerprint()
    assert make_scorers({"bm25": {"queries": queries, "k1": None, "text": None}})[0].fingerprint() == default
    assert make_scorers({"bm25": {"queries": queries, "stopwords": None}})[0].fingerprint()["stopwords"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no scorer is chosen; choose from .*'vector_filter'"),
        ({"vector_filer": {}}, "no scorer 'vector_filer'; did you mean 'vector_filter'"),
        ({"vector_filter": {"layer": 3}}, "no option 'layer'; did you mean 'layers'"),
        ({"vector_filter": {"concepts": []}}, "no option 'concepts'"),
        ({"vector_filter": [1]}, r"settings of the scorer 'vector_filter' are \[1\]"),
        ({"random": {"seed": "x"}}, "settings of the scorer 'random' cannot be used"),
        ({"bm25": {}}, r"'bm25' needs 'queries' \(or queries_url\)"),
        ({"bm25": {"queries": None}}, r"'bm25' needs 'queries' \(or queries_url\)"),
        ({"bm25": {"queries": ["a"], "queries_url": "b"}}, "both queries and queries_url"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_scorers(settings, [CONCEPT])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", '"ok"\n{"text": \n', "line 2 of .* is not JSON"),
        ("q.jsonl", '{"answer": "x"}\n', "line 1 of .* holds no text"),
        ("q.json", '{"text": "x"}', "expected a list of texts"),
        ("q.txt", "\n\n", "bm25 needs queries"),
    ],
)
def test_broken_query_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        make_scorers({"bm25": {"queries_url": str(tmp_path / name)}})
