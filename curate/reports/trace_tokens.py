"""A conversation's tokens as HTML: colour and line say which latent dominates a token, intensity how much it matters.

In: TokenText and each latent's influence. Out: escaped HTML in which every token carries what the page's script needs
to light a latent or to tell of a token. Six colours with a line of its own each (solid, dashed, dotted, double, wavy,
thick), so that the colour-blind and a grey print tell them apart too. Knows no page.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from curate.reports.text import count_hidden, visible
from curate.reports.trace_data import Firing, TokenText

COLOURS = 6
LEVELS = 4
STEPS = "abcd"  # of a latent's activation at a token against its largest in the text
MAX_TOKENS = 1500  # of one text
MAX_FIRING = 4  # latents told of at one token
MAX_HIDDEN = 300  # hidden characters, beyond which a text is shown without colours
_SHORTEST = 5  # tokens of a sentence; shorter ones ("A.") are taken with what follows
_ENDS = (".", "!", "?", "。", "！", "？")


@dataclass(frozen=True)
class Segment:
    """A part of a conversation: "prompt", "response" or "after" (what the template adds)."""

    kind: str
    html: Markup


@dataclass(frozen=True)
class Shown:
    """A text as it is shown. counts: tokens on which each latent fires, of those shown. plain: nothing is coloured."""

    segments: tuple[Segment, ...]
    counts: Mapping[int, int]
    tokens: int
    left_out: int
    plain: bool


@dataclass(frozen=True)
class _Token:
    piece: str
    firing: tuple[tuple[Firing, float], ...]  # with its value, largest first

    @property
    def value(self) -> float:
        return self.firing[0][1] if self.firing else 0.0


def valued(text: TokenText, influence: Mapping[int, float]) -> list[_Token]:
    """Each token with activation × influence of its latents, largest first; those without an influence left out."""
    out = []
    for piece, firing in zip(text.pieces[:MAX_TOKENS], text.firing[:MAX_TOKENS], strict=True):
        found = [(f, f.activation * influence.get(f.latent, 0.0)) for f in firing]
        ranked = sorted((p for p in found if p[1] != 0), key=lambda p: (-abs(p[1]), p[0].latent))
        out.append(_Token(piece, tuple(ranked[:MAX_FIRING])))
    return out


def palette(texts: Iterable[tuple[TokenText, Mapping[int, float]]]) -> dict[int, int]:
    """Colours 1–6 for the latents that dominate most of these texts, by the sum of their shares of each text."""
    weight: dict[int, float] = defaultdict(float)
    for text, influence in texts:
        tokens = valued(text, influence)
        largest = max((abs(t.value) for t in tokens), default=0.0) or 1.0
        for token in tokens:
            if token.firing:
                weight[token.firing[0][0].latent] += abs(token.value) / largest
    ranked = sorted(weight, key=lambda latent: (-weight[latent], latent))
    return {latent: i + 1 for i, latent in enumerate(ranked[:COLOURS])}


def sentences(pieces: Sequence[str]) -> list[int]:
    """The number of each piece's sentence; one ends with a full stop or a line, once it has a few tokens."""
    out, number, size = [], 0, 0
    for piece in pieces:
        out.append(number)
        size += 1
        if size >= _SHORTEST and ("\n" in piece or piece.rstrip().endswith(_ENDS)):
            number, size = number + 1, 0
    return out


def shown(text: TokenText, influence: Mapping[int, float], colours: Mapping[int, int]) -> Shown:
    """The text's HTML. A token below 1/8 of its sentence's (or text's) strongest one has no colour there."""
    tokens = valued(text, influence)
    whole = len(text.pieces) + text.left_out
    bounds = ((0, text.start, "prompt"), (text.start, text.stop, "response"), (text.stop, len(tokens), "after"))
    parts = [(tokens[a:b], a, kind) for a, b, kind in bounds if tokens[a:b]]
    if sum(count_hidden(t.piece) for t in tokens) > MAX_HIDDEN:
        plain = (Segment(kind, visible("".join(t.piece for t in part))) for part, _, kind in parts)
        return Shown(tuple(plain), {}, whole, whole - len(tokens), True)
    of = sentences([t.piece for t in tokens])
    in_sentence: dict[int, float] = {}
    of_latent: dict[int, float] = {}
    counts: Counter[int] = Counter()
    for token, sentence in zip(tokens, of, strict=True):
        in_sentence[sentence] = max(in_sentence.get(sentence, 0.0), abs(token.value))
        for f, _ in token.firing:
            of_latent[f.latent] = max(of_latent.get(f.latent, 0.0), abs(f.activation))
            counts[f.latent] += 1
    in_text = max(in_sentence.values(), default=0.0)

    def levels(at: int) -> tuple[int, int]:
        size = abs(tokens[at].value)
        return _level(size, in_sentence[of[at]]), _level(size, in_text)

    segments = tuple(
        Segment(kind, Markup("").join(_html(part, start, levels, of_latent, colours))) for part, start, kind in parts
    )
    return Shown(segments, counts, whole, whole - len(tokens), in_text == 0)


def _html(
    tokens: Sequence[_Token],
    start: int,
    levels: Callable[[int], tuple[int, int]],
    largest: Mapping[int, float],
    colours: Mapping[int, int],
) -> Iterator[Markup]:
    """Tokens at which nothing fires in one piece; the first of a run of one colour carries its number."""
    before = 0
    for none, run in groupby(enumerate(tokens, start), key=lambda p: not p[1].firing):
        if none:
            before = 0
            yield visible("".join(token.piece for _, token in run))
            continue
        for at, token in run:
            in_sentence, in_text = levels(at)
            colour = colours.get(token.firing[0][0].latent, 0)
            names = [f"t c{colour} i{in_sentence} j{in_text}", *(["m"] if token.value < 0 else [])]
            names += [f"k{f.latent}{_step(f.activation, largest[f.latent])}" for f, _ in token.firing]
            number = ""
            if colour and colour != before and in_sentence and token.piece.strip():
                number = Markup(' data-n="{}"').format(colour)
            before = colour if in_sentence else 0
            told = ";".join(_told(f, value) for f, value in token.firing)
            word = token.piece.lstrip(" ") or token.piece  # the number stands at the word, not at the space before it
            yield visible(token.piece[: len(token.piece) - len(word)])
            yield Markup('<span class="{}"{} data-f="{}">{}</span>').format(
                " ".join(names), number, told, visible(word)
            )


def _told(f: Firing, value: float) -> str:
    own = "" if f.influence is None else f"{f.influence:.3g}"
    return f"{f.latent},{f.activation:.3g},{value:.3g},{own}"


def _level(size: float, largest: float) -> int:
    return int(LEVELS * size / largest + 0.5) if largest > 0 else 0


def _step(activation: float, largest: float) -> str:
    return STEPS[min(LEVELS - 1, max(0, math.ceil(LEVELS * abs(activation) / largest) - 1))] if largest else STEPS[0]


def context(pieces: Sequence[tuple[str, float]], latent: int) -> Markup:
    """The surroundings of a place where `latent` fires: its activation as the depth of one colour."""
    largest = max((abs(a) for _, a in pieces), default=0.0)
    if sum(count_hidden(piece) for piece, _ in pieces) > MAX_HIDDEN:
        return visible("".join(piece for piece, _ in pieces))
    out = []
    for none, run in groupby(pieces, key=lambda p: p[1] == 0):
        if none:
            out.append(visible("".join(piece for piece, _ in run)))
            continue
        for piece, activation in run:
            level = max(1, _level(abs(activation), largest))
            out.append(
                Markup('<span class="t a{} k{}{}" data-f="{},{:.3g},,">{}</span>').format(
                    level, latent, _step(activation, largest), latent, activation, visible(piece)
                )
            )
    return Markup("").join(out)
