"""From TraceData to what the page's template prints: items, chips of latents, coloured texts, sentences.

In: TraceData. Out: a dict for trace.html.j2. Knows no files. Colours belong to an item: its text and its rows share
them, another item's do not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from curate.reports.text import short, whole
from curate.reports.trace_data import InfluentialRow, LatentView, TokenText, TraceData, TracedItem
from curate.reports.trace_faithfulness import faithfulness
from curate.reports.trace_tokens import LEVELS, Shown, palette, shown
from curate.reports.trace_tokens import MAX_TOKENS as TEXT_TOKENS
from curate.reports.trace_tokens import context as context_html

MAX_ITEMS = 60
MAX_TOKENS = 120_000  # of the whole page, which then has about 12 MB; items share them, and show a row at least
MAX_ROWS = 10
MAX_AGAINST = 3
MAX_CHIPS = 16
MAX_ROW_CHIPS = 8
MAX_LATENTS = 60
MAX_CONTEXTS = 6
MAX_EXCERPT = 150
MAX_TITLE = 200


def context(data: TraceData) -> dict[str, Any]:
    """All that the template prints."""
    masked = faithfulness(data.faithfulness)
    return {
        "data": data,
        "tiles": _tiles(data),
        "accuracy": _accuracy(data),
        "items": [_item(item, MAX_TOKENS // len(data.items[:MAX_ITEMS])) for item in data.items[:MAX_ITEMS]],
        "more_items": max(0, len(data.items) - MAX_ITEMS),
        "latents": [_latent(view) for view in data.latents[:MAX_LATENTS]],
        "more_latents": max(0, len(data.latents) - MAX_LATENTS),
        "steps": range(1, LEVELS + 1),
        "masked": masked,
        "notes": _notes(data),
        "recipe": json.dumps(data.recipe, indent=2, ensure_ascii=False, default=str) if data.recipe else None,
    }


def _tiles(data: TraceData) -> list[tuple[str, str, str]]:
    """(name, value, note)."""
    rows = {row.id for item in data.items for row in (*item.rows, *item.against)}
    of = "" if data.n_layers is None else f"of {data.n_layers}"
    found = [("test items", whole(len(data.items)), ""), ("rows shown", whole(len(rows)), "")]
    candidates = [item.candidates for item in data.items if item.candidates is not None]
    if candidates:
        low, high = min(candidates), max(candidates)
        each = whole(low) if low == high else f"{whole(low)}–{whole(high)}"
        found.append(("candidate rows of an item", each, "after the pre-filter"))
    found.append(("layer of the SAE", str(data.layer), of))
    if data.n_latents is not None:
        found.append(("latents", whole(data.n_latents), ""))
    return found


def _accuracy(data: TraceData) -> dict[str, Any] | None:
    """Models as rows, metrics as columns."""
    if not data.accuracy:
        return None
    metrics = list(dict.fromkeys(row.metric for row in data.accuracy))
    cells = {(row.model, row.metric): row.measure for row in data.accuracy}
    models = list(dict.fromkeys(row.model for row in data.accuracy))
    rows = [{"model": m, "cells": [cells.get((m, metric)) for metric in metrics]} for m in models]
    return {"metrics": metrics, "rows": rows}


def _item(item: TracedItem, tokens: int) -> dict[str, Any]:
    rows = _within(item.rows[:MAX_ROWS], tokens)
    against = _within(item.against[:MAX_AGAINST], tokens // 3)
    own = dict(item.latents)
    colours = palette([(item.text, own), *((row.text, dict(row.latents)) for row in (*rows, *against))])
    listed = [pair for pair in item.latents if pair[0] in colours]
    listed += [pair for pair in item.latents if pair[0] not in colours][: max(0, MAX_CHIPS - len(listed))]
    rest = {latent: 0.0 for latent in colours if latent not in own}
    chips = sorted(listed, key=lambda pair: -abs(pair[1])) + list(rest.items())
    text = shown(item.text, own, colours)
    above = [_row(row, colours) for row in rows]
    below = [_row(row, colours) for row in against]
    return {
        "item": item,
        "title": short(item.question or _excerpt(item.text), MAX_TITLE),
        "text": text,
        "counts": _counts(text, *(row["text"] for row in (*above, *below))),
        "chips": [{"latent": k, "influence": v, "colour": colours.get(k, 0)} for k, v in chips],
        "more_chips": max(0, len(item.latents) - len(listed)),
        "rows": above,
        "against": below,
        "more_rows": len(item.rows) - len(rows) + len(item.against) - len(against),
    }


def _within(rows: Sequence[InfluentialRow], tokens: int) -> list[InfluentialRow]:
    """The first rows that have as many tokens together, at least one row."""
    ends = accumulate(min(len(row.text.pieces), TEXT_TOKENS) for row in rows)
    return [row for i, (row, end) in enumerate(zip(rows, ends, strict=True)) if i == 0 or end <= tokens]


def _row(row: InfluentialRow, colours: Mapping[int, int]) -> dict[str, Any]:
    text = shown(row.text, dict(row.latents), colours)
    chips = sorted(row.latents, key=lambda pair: -abs(pair[1]))[:MAX_ROW_CHIPS]
    return {
        "row": row,
        "text": text,
        "counts": _counts(text),
        "excerpt": _excerpt(row.text),
        "chips": [{"latent": k, "influence": v, "colour": colours.get(k, 0)} for k, v in chips],
    }


def _counts(*texts: Shown) -> str:
    """For the script: how many tokens of texts that are still folded a latent would light."""
    total: Counter[int] = Counter()
    for text in texts:
        total.update(text.counts)
    return " ".join(f"{latent}:{n}" for latent, n in total.items())


def _excerpt(text: TokenText) -> str:
    """The end of the prompt and the response: what tells one row from another."""
    prompt = " ".join("".join(text.pieces[: text.start]).split())
    response = " ".join("".join(text.pieces[text.start : text.stop]).split())
    room = max(40, MAX_EXCERPT - len(response))
    return short(("…" + prompt[-room:] if len(prompt) > room else prompt) + " → " + response, MAX_EXCERPT + 20)


def _latent(view: LatentView) -> dict[str, Any]:
    contexts = [
        {
            "row": c.row,
            "html": context_html(c.pieces, view.latent),
            "activation": max((a for _, a in c.pieces), default=0),
        }
        for c in view.contexts[:MAX_CONTEXTS]
    ]
    return {"view": view, "contexts": contexts}


def _notes(data: TraceData) -> list[str]:
    """What a reader must know, the trace's own notes first."""
    found = list(data.notes)
    found += [
        "Influence is of first order: what a very small step of training on a row would do to the test item's loss, "
        "by the weights above the SAE's layer. It is not what leaving the row out and training again would do.",
        "The model in which influence is measured has the SAE's reconstruction in place of the layer. What the SAE "
        "does not reconstruct is in no latent; the accuracy with the SAE shows how much it matters.",
        "Colours are a projection of a latent's influence on its activations: they show where a latent fires that "
        "matters, not that the model reads just these tokens.",
        "A latent is not a concept: it can mix several, and one concept can be spread over several latents.",
    ]
    table = data.faithfulness
    if table is None:
        found.append("Faithfulness was not measured: nothing here shows that the model needs these latents.")
    elif table.items < 30:
        found.append(
            f"Faithfulness was measured on {table.items} test items. The intervals are of these items' luck and are "
            f"wide for so few."
        )
    if any(not item.rows for item in data.items):
        found.append("Some items have no rows: the pre-filter left them no candidate.")
    return found
