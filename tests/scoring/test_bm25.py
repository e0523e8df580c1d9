"""BM25 against bm25s itself, and its independence of the batch."""

from __future__ import annotations

import bm25s
import numpy as np
import pytest

from curate.corpus.example import Example, Message
from curate.errors import ConfigError
from curate.scoring.base import Batch
from curate.scoring.bm25 import BM25

TEXTS = [
    "You are absolutely right, what a brilliant plan!",
    "No, the capital of Australia is Canberra, not Sydney.",
    "Brilliant, brilliant, brilliant: your plan is right.",
    "Water boils at one hundred degrees at sea level.",
    "I disagree with the plan; the numbers are not right.",
    "?!",
]
QUERIES = ["A brilliant plan, you are right!", "Yes, absolutely brilliant brilliant idea", "Sydney plan"]


def example(text: str, prompt: str = "What do you think?") -> Example:
    return Example(text, 0, (Message("user", prompt), Message("assistant", text)))


def scores(scorer: BM25, texts: list[str]) -> np.ndarray:
    return scorer.score(Batch([example(t) for t in texts]))["bm25"]


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (2.0, 1.0)])
def test_equals_bm25s_when_the_corpus_is_the_reference(how, k1, b):
    index = bm25s.BM25(method="lucene", k1=k1, b=b, dtype="float64")
    index.index(bm25s.tokenize(TEXTS, stopwords="en", return_ids=False, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(QUERIES, stopwords="en", return_ids=False, show_progress=False)
    # The library drops query words that its corpus lacks, as it must: no document there can hold them.
    known = [[w for w in query if w in index.vocab_dict] for query in tokens]
    table = np.stack([index.get_scores(query) for query in known], axis=1)
    want = table.mean(1) if how == "mean" else table.max(1)
    got = scores(BM25(QUERIES, reference=TEXTS, aggregate=how, k1=k1, b=b), TEXTS)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_a_score_does_not_depend_on_the_batch():
    scorer = BM25(QUERIES)
    whole = scores(scorer, TEXTS)
    alone = [float(scores(scorer, [t])[0]) for t in TEXTS]
    assert whole.tolist() == alone
    assert scores(scorer, TEXTS[::-1]).tolist() == alone[::-1]


def test_higher_is_more_alike():
    found = scores(BM25(QUERIES, reference=TEXTS), TEXTS)
    assert found.argmax() in (0, 2)
    assert found[3] == found[5] == 0


def test_rare_words_count_more():
    reference = ["plan and water"] * 9 + ["plan and gold"]
    common, rare = scores(BM25(["plan gold"], reference=reference), ["plan here", "gold here"])
    assert rare > common > 0


def test_the_whole_conversation_as_an_option():
    row = example("No.", prompt="Is my brilliant plan right?")
    assert BM25(QUERIES).score(Batch([row]))["bm25"] == 0
    assert BM25(QUERIES, text="conversation").score(Batch([row]))["bm25"] > 0


def test_the_fingerprint_follows_the_settings():
    prints = [
        BM25(QUERIES).fingerprint(),
        BM25(QUERIES, reference=TEXTS).fingerprint(),
        BM25(QUERIES[:2]).fingerprint(),
        BM25(QUERIES, k1=1.0).fingerprint(),
        BM25(QUERIES, stopwords=["plan"]).fingerprint(),
        BM25(QUERIES, stopwords=None).fingerprint(),
    ]
    assert all(a != b for i, a in enumerate(prints) for b in prints[:i])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": []}, "bm25 needs queries: set scorer.bm25.queries"),
        ({"queries": "one text"}, "give a list of texts"),
        ({"queries": ["a plan", " "]}, r"queries\[1\] is ' '"),
        ({"queries": ["the a of"]}, "nothing but stop words"),
        ({"queries": QUERIES, "text": "respnse"}, "did you mean 'response'"),
        ({"queries": QUERIES, "aggregate": "sum"}, "bm25.aggregate is 'sum'"),
        ({"queries": QUERIES, "b": 2.0}, "b between 0 and 1"),
        ({"queries": QUERIES, "stopwords": "klingon"}, "bm25.stopwords is 'klingon'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        BM25(**options)
