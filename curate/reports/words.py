"""Plain words for scores: what a column measures, and what the measured numbers allow one to say.

In: column names and metrics. Out: sentences for a reader who has not seen the code. Knows no page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from curate.evaluation.ranking import Ranking

BEHAVIOURS = ("loss", "contrast")
_POOLINGS = "last_prompt_token|cosine|softmax|whole"
_COLUMN = re.compile(
    rf"^(?P<method>[^.]+)(?:\.(?!L\d+(?:\.|$))(?P<concept>.+?))?(?:\.L(?P<layer>\d+))?(?:\.(?P<pooling>(?:{_POOLINGS})(?:\.whole)?))?$"
)

METHODS = {
    "vector_filter": "how far the model's own reading of the response points along the trait's direction "
    "(mean activation over the response, projected on the direction)",
    "projection_difference": "how much further the response points along the trait's direction than the base model's "
    "own answer to the same prompt",
    "loss_gradient_alignment": "how strongly training on the row would push the model's activations along the "
    "trait's direction",
    "influence_function": "how much training on the row would raise the behaviour, to first order: the row's gradient "
    "against that of the queries' responses, weighed by the curvature of the training loss (−⟨H⁻¹∇f, ∇L⟩)",
    "concept_influence": "how much training on the row would move the queries' activations along the trait's "
    "direction, to first order: the row's gradient against that of the projection, weighed by the curvature of the "
    "training loss (−⟨H⁻¹∇f, ∇L⟩)",
    "gradient_product": "the row's gradient against that of the behaviour, without curvature (H = I): what one small "
    "step of training on the row would do",
    "gradient_cosine": "the angle between the row's gradient and that of the behaviour, their sizes left out: the "
    "cosine of one small step of training on the row with the step that raises the behaviour most",
    "random": "a random number: a control that any useful score must beat",
    "response_length": "the number of tokens in the response: a control that knows nothing of content",
    "activation_norm": "the size of the model's activations whatever their direction: a control",
    "bm25": "the words that the conversation shares with example queries: a control that knows only keywords",
    "embedding_similarity": "how near the conversation lies to example queries by sentence embedding: a control",
}

CURVATURES = {
    "ekfac": "EK-FAC",
    "kfac": "K-FAC",
    "diagonal": "diagonal of the Fisher matrix",
    "identity": "none (H = I: gradients as they are)",
    "cg": "conjugate gradients on a few rows' loss",
}
FISHERS = {
    "sampled": "true Fisher (labels drawn from the model)",
    "empirical": "empirical Fisher (labels of the data)",
}


@dataclass(frozen=True)
class Column:
    """A column's name taken apart: method[.concept or behaviour][.L<layer>][.pooling]. A behaviour without a concept
    is "loss" or "contrast"."""

    name: str
    method: str
    concept: str | None
    layer: int | None
    behaviour: str | None = None
    pooling: str | None = None

    @property
    def title(self) -> str:
        """For headings: "vector filter, sycophantic, layer 15"."""
        parts = [self.method.replace("_", " ")]
        parts += [part for part in (self.concept, self.behaviour) if part]
        if self.layer is not None:
            parts.append(f"layer {self.layer}")
        if self.pooling:
            parts.append(self.pooling.replace("_", " ").replace(".", " "))
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
    concept, layer = m["concept"], int(m["layer"]) if m["layer"] else None
    behaviour = None
    if concept in BEHAVIOURS:
        concept, behaviour = None, concept
    elif concept and concept.endswith(".contrast"):
        concept, behaviour = concept.removesuffix(".contrast"), "contrast"
    return Column(name, m["method"], concept, layer, behaviour, m["pooling"])


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
