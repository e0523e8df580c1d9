"""Embedding similarity baseline: cosine of a row's sentence embedding with those of query texts. Higher = more alike.

Needs the package sentence-transformers (optional). Texts beyond the embedding model's own limit are cut by it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from curate.errors import ConfigError
from curate.scoring.base import Batch, Columns, Needs, Scorer
from curate.scoring.texts import AGGREGATES, PARTS, aggregate, check_choice, check_queries, digest_texts, example_text


class EmbeddingSimilarity(Scorer):
    """`model`: name or folder of a sentence-transformers model; loaded in `prepare`, where the scoring is done."""

    name = "embedding_similarity"

    def __init__(
        self,
        queries: Sequence[str],
        model: str = "sentence-transformers/all-MiniLM-L6-v2",
        text: str = "response",
        aggregate: str = "mean",
        batch_size: int = 64,
    ) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ConfigError(
                f"{self.name} needs the package sentence-transformers, which is not installed: "
                f"pip install sentence-transformers (or the extra: pip install 'curate[embeddings]')"
            )
        self.queries = check_queries(self.name, queries)
        self.text = check_choice(self.name, "text", text, PARTS)
        self.aggregate = check_choice(self.name, "aggregate", aggregate, AGGREGATES)
        self.model, self.batch_size = model, int(batch_size)
        self._encoder: Any = None
        self._queries: np.ndarray | None = None

    def needs(self) -> Needs:
        return Needs()

    def columns(self) -> list[str]:
        return [self.name]

    def prepare(self, device: torch.device) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            self._encoder = SentenceTransformer(self.model, device=str(device), trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise ConfigError(f"{self.name}.model is {self.model!r}, which cannot be loaded: {e}") from e
        self._queries = self._encode(self.queries)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings [n, d], float64."""
        found = self._encoder.encode(
            list(texts),
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(found, dtype=np.float64)

    def score(self, batch: Batch) -> Columns:
        assert self._queries is not None, "prepare() loads the embedding model"
        rows = self._encode([example_text(e, self.text) for e in batch.examples])
        return {self.name: aggregate(rows @ self._queries.T, self.aggregate)}

    def fingerprint(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "queries": digest_texts(self.queries),
            "model": self.model,
            "text": self.text,
            "aggregate": self.aggregate,
        }
