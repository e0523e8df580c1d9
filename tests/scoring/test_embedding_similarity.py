"""Embedding similarity with a tiny sentence-transformers model made here; without the package, a clear refusal."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from curate.errors import ConfigError
from curate.scoring.base import Batch
from curate.scoring.embedding_similarity import EmbeddingSimilarity
from tests.scoring.rows import make_examples
from tests.tiny import save_tiny

EXAMPLES = make_examples()
QUERIES = ["You are absolutely right!", "No."]
INSTALLED = importlib.util.find_spec("sentence_transformers") is not None


@pytest.mark.skipif(INSTALLED, reason="sentence-transformers is installed")
def test_without_the_package_the_remedy_is_named():
    with pytest.raises(ConfigError, match="pip install sentence-transformers"):
        EmbeddingSimilarity(QUERIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sentence_transformers", reason="the optional package is not installed")
    # A plain Hugging Face folder: the library adds a mean over the tokens.
    return str(save_tiny(tmp_path_factory.mktemp("encoder")))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_cosine_with_the_queries(folder, how):
    scorer = EmbeddingSimilarity(QUERIES, model=folder, aggregate=how)
    scorer.prepare(torch.device("cpu"))
    got = scorer.score(Batch(EXAMPLES))["embedding_similarity"]
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(folder, device="cpu")
    rows = [encoder.encode(e.response).astype(np.float64) for e in EXAMPLES]
    queries = [encoder.encode(q).astype(np.float64) for q in QUERIES]
    table = np.array([[r @ q / np.linalg.norm(r) / np.linalg.norm(q) for q in queries] for r in rows])
    np.testing.assert_allclose(got, table.mean(1) if how == "mean" else table.max(1), rtol=1e-4)
    alone = [float(scorer.score(Batch([e]))["embedding_similarity"][0]) for e in EXAMPLES]
    np.testing.assert_allclose(got, alone, rtol=1e-4)


def test_a_model_that_is_not_there(folder, tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        EmbeddingSimilarity(QUERIES, model=str(tmp_path / "none")).prepare(torch.device("cpu"))
