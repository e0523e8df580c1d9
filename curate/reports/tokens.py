"""Tokens as coloured text: each as strongly coloured as its share of the score is large.

In: (text, value) pairs. Out: escaped HTML in two parts, before and after the fold. Two hues that colour-blind readers
tell apart, and a solid or dotted line below, so that print and grey screens tell them apart too. Knows no page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from curate.reports.text import count_hidden, fold, number, visible

LEVELS = 4
MAX_HIDDEN = 300  # hidden characters; beyond it the text is shown plain, where marks are counted as one text


def coloured(tokens: Sequence[tuple[str, float]], shown: int, limit: int, most: int) -> dict[str, Any]:
    """As `fold` cuts a text, so are the tokens: {head, rest: Markup, left_out, whole: characters, plain: bool}.

    The strongest token of this text has full colour; one below 1/8 of it has none. At most the `most` strongest
    tokens are coloured: a bound on the page's size. plain: nothing could be coloured.
    """
    text = "".join(t for t, _ in tokens)
    head, rest, left_out = fold(text, shown, limit)
    out: dict[str, Any] = {"left_out": left_out, "whole": len(text), "shown": len(head)}
    sizes = sorted((abs(v) for _, v in tokens if math.isfinite(v)), reverse=True)
    if not sizes or sizes[0] == 0 or count_hidden(text[:limit]) > MAX_HIDDEN:
        return {**out, "head": visible(head), "rest": visible(rest), "plain": True}
    least = sizes[most] if len(sizes) > most else 0.0
    parts = (Markup("").join(_html(tokens, a, b, sizes[0], least)) for a, b in ((0, len(head)), (len(head), limit)))
    return {**out, "head": next(parts), "rest": next(parts) if rest else Markup(""), "plain": False}


def _html(tokens: Sequence[tuple[str, float]], start: int, stop: int, largest: float, least: float) -> Iterator[Markup]:
    """The characters [start, stop) of all tokens together; neighbours without colour in one piece."""

    def pieces() -> Iterator[tuple[str, float, int]]:
        at = 0
        for text, value in tokens:
            piece = text[max(0, start - at) : max(0, stop - at)]
            at += len(text)
            size = abs(value) if math.isfinite(value) else 0.0
            level = int(LEVELS * size / largest + 0.5) if size > least or least == 0 else 0
            if piece:
                yield piece, value, level

    for none, run in groupby(pieces(), key=lambda p: p[2] == 0):
        if none:
            yield visible("".join(piece for piece, _, _ in run))
            continue
        for piece, value, level in run:
            sign = "+" if value > 0 else ""
            yield Markup('<span class="{}{}" title="{}{}">{}</span>').format(
                "up" if value > 0 else "down", level, sign, number(value, 3), visible(piece)
            )


def scale(levels: int = LEVELS) -> list[tuple[str, str]]:
    """The legend's swatches, from the lowest to the highest: (class, share of the strongest token)."""
    down = [(f"down{i}", f"−{i / levels:g}") for i in range(levels, 0, -1)]
    return [*down, ("", "0"), *((f"up{i}", f"+{i / levels:g}") for i in range(1, levels + 1))]
