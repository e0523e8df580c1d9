"""What the page of a trace is made from: plain values, checked once, and the same as JSON.

In: what the trace gathered: test items, the rows that influence them, tokens, latents, faithfulness, orthogonality.
Out: a frozen TraceData. Knows nothing of how influence is computed, and nothing of HTML.

Sign: as everywhere, a positive influence means that training on it helps the test item's right answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from curate.errors import ConfigError
from curate.evaluation.base import Measure
from curate.evaluation.masking import FaithfulnessTable
from curate.evaluation.orthogonality import Orthogonality


@dataclass(frozen=True)
class Firing:
    """A latent at a token: its activation there, and the token's own influence through it (None for a test item)."""

    latent: int
    activation: float
    influence: float | None = None


@dataclass(frozen=True)
class TokenText:
    """A conversation in pieces, one a token; joined they are the text.

    firing: per token the latents that fire there, at least the strongest by |activation × influence|; () for none.
    [start, stop): the response's tokens. left_out: tokens of the row after the last piece that are not given.
    """

    pieces: tuple[str, ...]
    firing: tuple[tuple[Firing, ...], ...]
    start: int
    stop: int
    left_out: int = 0


@dataclass(frozen=True)
class InfluentialRow:
    """A training row and what it does to one test item.

    score: Σ over its tokens and latents. latents: (latent, Σ over the row's tokens), strongest first. cosine: of its
    gradient with the item's, by which candidates were chosen. row, source: where it lies in the corpus.
    """

    id: str
    score: float
    latents: tuple[tuple[int, float], ...]
    text: TokenText
    row: int | None = None
    source: str | None = None
    label: str | None = None
    group: str | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Answer:
    """What one of the models answers to a test item. right: None where nobody can tell."""

    model: str
    text: str
    right: bool | None = None


@dataclass(frozen=True)
class TracedItem:
    """A test item: prompt and right answer, tokenised together.

    question: its text in a few words, for headings. latents: (latent, mean influence over the candidate rows),
    strongest first. rows: those with the highest scores, highest first. against: those with the lowest scores, lowest
    first. candidates: how many rows were scored for it.
    """

    id: str
    text: TokenText
    latents: tuple[tuple[int, float], ...]
    rows: tuple[InfluentialRow, ...]
    against: tuple[InfluentialRow, ...] = ()
    question: str = ""
    right: str | None = None
    answers: tuple[Answer, ...] = ()
    candidates: int | None = None


@dataclass(frozen=True)
class Context:
    """A place where a latent fires strongly: (piece, activation there) around it; 0 where it does not fire."""

    pieces: tuple[tuple[str, float], ...]
    row: str = ""


@dataclass(frozen=True)
class LatentView:
    """A latent over the whole trace.

    influence: mean over items of what TracedItem.latents holds; items: how many items name it. frequency: share of
    tokens on which it fires, where known. contexts: strongest first.
    """

    latent: int
    influence: float
    items: int
    frequency: float | None = None
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True)
class AccuracyRow:
    """One measure of one model: ("fine-tuned, with SAE", "accuracy", Measure)."""

    model: str
    metric: str
    measure: Measure


@dataclass(frozen=True)
class TraceData:
    """Everything on the page.

    facts: what was run, (name, value) in the reader's words: model, SAE, solve, candidates, sign, seconds. layer,
    n_layers: where the SAE sits, of how many. accuracy: rows of one model stand together. latents: most influential
    first. faithfulness (Faithfulness.table), orthogonality (spaces): None and () where not measured. notes: what a
    reader must know, each a sentence or two. recipe: as JSON values.

    Raises:
        ConfigError: two items of one id, a text whose pieces and firing differ in number or whose response lies
            outside, a number that is not finite (names item and row).
    """

    title: str
    created: str
    layer: int
    items: tuple[TracedItem, ...]
    latents: tuple[LatentView, ...] = ()
    n_layers: int | None = None
    n_latents: int | None = None
    accuracy: tuple[AccuracyRow, ...] = ()
    faithfulness: FaithfulnessTable | None = None
    orthogonality: tuple[Orthogonality, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise ConfigError(f"two test items of the trace are named {item.id!r}; a name stands for one item")
            seen.add(item.id)
            _check(f"test item {item.id!r}", item.text, item.latents)
            for row in (*item.rows, *item.against):
                _check(f"row {row.id!r} of test item {item.id!r}", row.text, row.latents, row.score)
        _finite("the list of latents", (x.influence for x in self.latents))


def _check(where: str, text: TokenText, latents: Sequence[tuple[int, float]], score: float = 0.0) -> None:
    tokens = len(text.pieces)
    if len(text.firing) != tokens:
        raise ConfigError(f"{where} has {tokens} tokens but latents for {len(text.firing)}; give a tuple for each")
    if not 0 <= text.start <= text.stop <= tokens + text.left_out:
        raise ConfigError(f"the response of {where} is [{text.start}, {text.stop}), outside its {tokens} tokens")
    _finite(where, (score, *(value for _, value in latents)))
    _finite(where, (x for fires in text.firing for f in fires for x in (f.activation, f.influence or 0.0)))


def _finite(where: str, values: Any) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ConfigError(f"{where} holds {value}; leave values out that are not finite, and say so in `notes`")


def dumps(data: TraceData) -> str:
    """As JSON text in one line (trace.json); `loads` gives an equal TraceData back."""
    return TypeAdapter(TraceData).dump_json(data).decode()


def loads(text: str, where: str = "the text") -> TraceData:
    """What `dumps` wrote.

    Raises:
        ConfigError: it is not the JSON of a trace's report; the message names `where` and the first thing amiss.
    """
    try:
        return TypeAdapter(TraceData).validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "the top"
        raise ConfigError(
            f"{where} is not the report of a trace: at {place}: {first['msg']}; `curate trace` writes a new one"
        ) from None
