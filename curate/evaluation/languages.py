"""Languages of texts: which are there, as far as a text is long enough to tell.

In: texts. Out: how many are in which language (ISO 639-1 codes, "" = cannot be told). py3langid decides: a naive Bayes
model over byte n-grams for 97 languages, in a wheel of 5 MB, without a network. It is sure of wrong things on short
texts, code and formulas; so texts of few letters and answers of low probability count as "cannot be told", and a
language counts as present from a share of the texts on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

UNKNOWN = ""
MIN_LETTERS = 40
MIN_PROBABILITY = 0.9
_MOST = 2000  # characters of a text that are looked at
_FEWEST = 3  # texts: a language of fewer is chance


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # two seconds

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> str:
    """The text's language, or UNKNOWN."""
    head = text[:_MOST]
    # A letter of a script without spaces (Chinese, Japanese, Korean, Thai) says as much as several of another.
    letters = sum(3 if ord(c) >= 0x0E00 else 1 for c in head if c.isalpha())
    if letters < MIN_LETTERS:
        return UNKNOWN
    code, probability = _identifier().classify(head)
    return str(code) if probability >= MIN_PROBABILITY else UNKNOWN


def languages(texts: Iterable[str]) -> Counter[str]:
    """How many texts are in each language."""
    return Counter(language(t) for t in texts)


def present(found: Mapping[str, int], share: float) -> set[str]:
    """The languages of at least `share` of the texts whose language can be told, and of more than a few."""
    known = {name: n for name, n in found.items() if name != UNKNOWN}
    least = max(_FEWEST, share * sum(known.values()))
    return {name for name, n in known.items() if n >= least}
