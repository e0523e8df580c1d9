"""Plain words for scores: what a column measures, and what the measured numbers allow one to say.

In: column names and metrics. Out: sentences for a reader who has not seen the code. Knows no page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from curate.reports.metrics import Ranking

_COLUMN = re.compile(r"^(?P<method>[^.]+)(?:\.(?P<concept>.+?))?(?:\.L(?P<layer>\d+))?$")

METHODS = {
    "vector_filter": "how far the model's own reading of the response points along the trait's direction "
    "(mean activation over the response, projected on the direction)",
    "projection_difference": "how much further the response points along the trait's direction than the base model's "
    "own answer to the same prompt",
    "loss_gradient_alignment": "how strongly training on the row would push the model's activations along the "
    "trait's direction",
    "random": "a random number: a control that any useful score must beat",
    "response_length": "the number of tokens in the response: a control that knows nothing of content",
    "activation_norm": "the size of the model's activations whatever their direction: a control",
    "bm25": "the words that the conversation shares with example queries: a control that knows only keywords",
    "embedding_similarity": "how near the conversation lies to example queries by sentence embedding: a control",
}


@dataclass(frozen=True)
class Column:
    """A column's name taken apart: method[.concept][.L<layer>]."""

    name: str
    method: str
    concept: str | None
    layer: int | None

    @property
    def title(self) -> str:
        """For headings: "vector filter, sycophantic, layer 15"."""
        parts = [self.method.replace("_", " ")]
        if self.concept:
            parts.append(self.concept)
        if self.layer is not None:
            parts.append(f"layer {self.layer}")
        return ", ".join(parts)

    @property
    def meaning(self) -> str:
        """What the number measures; for a method unknown here, only what holds for every score."""
        return METHODS.get(self.method, "a score that is higher the more of the trait the row is expected to teach")


def column(name: str) -> Column:
    """Take a column's name apart; a name of another shape is all method."""
    m = _COLUMN.match(name)
    if m is None:
        return Column(name, name, None, None)
    return Column(name, m["method"], m["concept"], int(m["layer"]) if m["layer"] else None)


def verdict(found: Ranking) -> tuple[str, str]:
    """(kind, sentence): whether the score separates the labelled rows, judged by ROC-AUC's interval against 0.5.

    ROC-AUC and not AUC-PR decides, since 0.5 is chance whatever the base rate. Kinds: good, weak, none, wrong.
    """
    low, high = found.roc_auc.low, found.roc_auc.high
    if low is None or high is None:
        return "none", "There are too few labelled rows to tell whether the score finds them better than chance."
    if low <= 0.5 <= high:
        return "none", "On these labels the score cannot be told from chance: do not rely on it to find such rows."
    if high < 0.5:
        return (
            "wrong",
            "On these labels the score points the wrong way: rows with the label tend to get lower scores than the "
            "others. Do not rely on it to find such rows.",
        )
    if found.roc_auc.value < 0.7:
        return "weak", "The score finds labelled rows better than chance, but weakly: expect many misses."
    return "good", "The score finds labelled rows clearly better than chance."
