"""BM25 baseline: how many telling words a row shares with query texts. Higher = more alike to the queries.

score = Σ_w idf(w)·tf/(tf + k1·(1 - b + b·length/average length)) over the words of a query (Lucene's variant), then
the mean or maximum over queries. Word statistics (idf and average length) come from a fixed reference, never from the
batch: a row's score must not depend on its neighbours. The words are cut by bm25s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from curate.errors import ConfigError
from curate.scoring.base import Batch, Columns, Needs, Scorer
from curate.scoring.texts import AGGREGATES, PARTS, aggregate, check_choice, check_queries, digest_texts, example_text


def words(texts: Sequence[str], stopwords: str | Sequence[str] | None) -> list[list[str]]:
    """Lower-case words of each text, without stop words."""
    import bm25s  # brings numba, which costs seconds; only this method should pay

    stop = [] if stopwords is None else stopwords if isinstance(stopwords, str) else list(stopwords)
    return bm25s.tokenize(list(texts), stopwords=stop, return_ids=False, show_progress=False)


class BM25(Scorer):
    """`queries`: texts that show the trait. `reference`: a sample of the corpus for the word statistics.

    Without a reference the queries are their own: words that many queries share then count less.
    """

    name = "bm25"

    def __init__(
        self,
        queries: Sequence[str],
        reference: Sequence[str] | None = None,
        text: str = "response",
        aggregate: str = "mean",
        k1: float = 1.5,
        b: float = 0.75,
        stopwords: str | Sequence[str] | None = "en",
    ) -> None:
        self.queries = check_queries(self.name, queries)
        self.reference = tuple(reference) if reference else self.queries
        self.text = check_choice(self.name, "text", text, PARTS)
        self.aggregate = check_choice(self.name, "aggregate", aggregate, AGGREGATES)
        if k1 < 0 or not 0 <= b <= 1:
            raise ConfigError(f"{self.name} has k1={k1} and b={b}; k1 must be 0 or more and b between 0 and 1")
        self.k1, self.b = float(k1), float(b)
        self.stopwords = stopwords if stopwords is None or isinstance(stopwords, str) else tuple(stopwords)
        try:
            query_words = [Counter(w) for w in words(self.queries, self.stopwords)]
        except ValueError as e:
            raise ConfigError(f"{self.name}.stopwords is {stopwords!r}: {e}") from None
        self.vocabulary = {w: i for i, w in enumerate(sorted(set().union(*query_words)))}
        if not self.vocabulary:
            raise ConfigError(f"{self.name}.queries hold nothing but stop words; give other queries or stopwords=null")
        self._queries = np.zeros((len(self.vocabulary), len(self.queries)))
        for q, counts in enumerate(query_words):
            for word, count in counts.items():
                self._queries[self.vocabulary[word], q] = count
        self._fit(words(self.reference, self.stopwords))

    def _fit(self, reference: list[list[str]]) -> None:
        holding = Counter(w for document in reference for w in self.vocabulary.keys() & set(document))
        n = len(reference)
        self._idf = np.array([math.log(1 + (n - holding[w] + 0.5) / (holding[w] + 0.5)) for w in self.vocabulary])
        self._average_length = max(sum(map(len, reference)) / n, 1.0)

    def needs(self) -> Needs:
        return Needs()

    def columns(self) -> list[str]:
        return [self.name]

    def score(self, batch: Batch) -> Columns:
        values: list[float] = []
        indices: list[int] = []
        ends = [0]
        for document in words([example_text(e, self.text) for e in batch.examples], self.stopwords):
            counts = Counter(w for w in document if w in self.vocabulary)
            norm = self.k1 * (1 - self.b + self.b * len(document) / self._average_length)
            # Sorted: a sum in one order has one value, whatever the order of the words in the text.
            for w in sorted(counts):
                i = self.vocabulary[w]
                indices.append(i)
                values.append(self._idf[i] * counts[w] / (counts[w] + norm))
            ends.append(len(indices))
        weights = sparse.csr_array((values, indices, ends), shape=(len(batch), len(self.vocabulary)), dtype=np.float64)
        return {self.name: aggregate(weights @ self._queries, self.aggregate)}

    def fingerprint(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "queries": digest_texts(self.queries),
            "reference": digest_texts(self.reference),
            "text": self.text,
            "aggregate": self.aggregate,
            "k1": self.k1,
            "b": self.b,
            "stopwords": list(self.stopwords) if isinstance(self.stopwords, tuple) else self.stopwords,
        }
