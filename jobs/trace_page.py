"""The page of a trace: what its stages found, put together. Holds no mathematics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from connectors import storage
from curate.curvature.queries import QueryExample
from curate.evaluation.base import Item
from curate.models.load import load_tokenizer
from curate.reports import trace as page
from curate.reports.trace_data import AccuracyRow, Answer, TraceData, TracedItem, dumps
from curate.runtime.evaluate import Evaluation, load_items
from curate.runtime.trace import View

if TYPE_CHECKING:
    from jobs.tracing import Tracing


def write(tracing: Tracing) -> str:
    """<sink>/trace.html and trace.json beside trace.parquet, after whatever is not made. Returns what is printed."""
    data = trace_data(tracing)
    url = storage.join(tracing.pipeline.sink, "trace")
    storage.write_atomic(f"{url}.json", dumps(data) + "\n")
    page.write(f"{url}.html", data)
    lines = [f"{item.id}: {_line(item)}" for item in data.items]
    return "\n".join([*lines, f"report: {url}.html", f"numbers: {url}.json", f"all pairs: {url}.parquet"])


def trace_data(tracing: Tracing) -> TraceData:
    """Everything on the page; makes what is not there."""
    p, s, sae = tracing.pipeline, tracing.settings, tracing.sae
    evaluations = tracing.evaluations  # first: they say whether the model with the SAE is worth a trace
    output, recipe = tracing.latents
    seen, faithful, spaces = tracing.seen
    view = View(tracing.totals, output, p.manifest, p.reader, load_tokenizer(p.model), s.latents, s.contexts)
    answers = _answers(evaluations, tracing.names)
    asked = tracing.influence.query_examples[: len(tracing.items)]
    items = [
        replace(view.item(i, query, _heading(text), look), answers=answers.get(query.id, ()))
        for i, (query, text, look) in enumerate(zip(tracing.items, asked, seen, strict=True))
    ]
    return TraceData(
        title=tracing.config.report.title,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        layer=sae.layer,
        items=tuple(items),
        latents=view.latents(),
        n_layers=tracing.influence.identity["layers"],
        n_latents=sae.latents,
        accuracy=_accuracy(tracing, evaluations),
        faithfulness=faithful,
        orthogonality=spaces,
        facts=tuple(_facts(tracing)),
        notes=tuple(_notes(tracing)),
        recipe=recipe.fields,
    )


def _accuracy(tracing: Tracing, evaluations: Sequence[Evaluation]) -> tuple[AccuracyRow, ...]:
    if not evaluations:
        return ()
    titles = {(label, m.name): m.title for label, e in tracing.evaluating.evaluators.items() for m in e.metrics}
    return tuple(
        AccuracyRow(e.model, titles[e.evaluator, name], measure)
        for e in evaluations
        for name, measure in e.measures.items()
        if measure.value is not None
    )


def _answers(evaluations: Sequence[Evaluation], names: Sequence[str]) -> dict[str, tuple[Answer, ...]]:
    """By test item, what the models answer to it, where an evaluator asked it under the same id."""
    wanted, out = set(names), dict[str, tuple[Answer, ...]]()
    for e in evaluations:
        for item in load_items(e.url):
            if item.id in wanted and (text := (item.detail or {}).get("answer")):
                out[item.id] = (*out.get(item.id, ()), Answer(e.model, text, _right(item)))
    return out


def _right(item: Item) -> bool | None:
    value = item.values.get("accuracy")
    return None if value is None else value == 1.0


def _facts(tracing: Tracing) -> list[tuple[str, str]]:
    p, s, sae, kept = tracing.pipeline, tracing.settings, tracing.sae, tracing.bounds
    form = f"{sae.activation}" + (f" with k={sae.k}" if sae.k else "")
    share = (
        "all rows" if kept is None else f"of each item the {s.keep:.3g} of the rows with the largest gradient cosine"
    )
    if kept is not None and s.min_cosine is not None:
        share += f", at least {s.min_cosine:g}"
    return [
        ("model", str(tracing.influence.identity["name"])),
        ("adapter", tracing.influence.tuned.adapter or "none"),
        ("SAE", f"{sae.name}: layer {sae.layer}, {sae.latents:,} latents, {form}"),
        ("solve", _solve(tracing.vectors[1].meta)),
        ("rows", f"{p.manifest.rows:,}"),
        ("candidates", share),
        ("pairs of row and item", f"{int(tracing.totals.pairs.sum()):,}"),
        ("backend", s.backend),
        ("seconds of this run", f"{time.monotonic() - tracing.began:.0f}"),
    ]


def _solve(meta: Mapping[str, Any]) -> str:
    """How the test vectors were solved, in words."""
    if (cg := meta.get("cg")) is not None:
        items = cg["items"].values()
        negative = sum(item["negative"] > 0 for item in items)
        return (
            f"conjugate gradients on {cg['drawn']} rows ({cg['product'].replace('_', '–')}), at most "
            f"{cg['iterations']} steps, damping {cg['damping']:.3g}: {sum(item['converged'] for item in items)} of "
            f"{len(items)} items converged, largest residual {max(item['residuals'][-1] for item in items):.2g}"
        ) + (f", negative curvature met by {negative}" if negative else "")
    damping = meta.get("damping")
    if meta.get("curvature") == "identity" or not damping:
        return "none (H = I)"
    unit = " × the layer's mean eigenvalue" if damping["kind"] == "relative" else ""
    return f"{meta['curvature']}, damping {damping['value']:g}{unit}"


def _notes(tracing: Tracing) -> list[str]:
    out = []
    cg = tracing.vectors[1].meta.get("cg")
    if cg is not None and (left := [name for name, item in cg["items"].items() if not item["converged"]]):
        out.append(
            f"Conjugate gradients ended before they reached the tolerance for {len(left)} items, such as {left[0]!r}: "
            f"their test vectors are approximate."
        )
    if (empty := int((tracing.totals.pairs == 0).sum())) > 0:
        out.append(f"{empty} of {len(tracing.names)} items have no candidate row, and so no influence.")
    if (n := tracing.settings.token_latents) is not None:
        out.append(
            f"Of each token of a training row the {n} latents of the largest |activation × influence| are shown; sums "
            f"over tokens are of all latents."
        )
    return out


def _heading(asked: QueryExample) -> str:
    """The first line of what is asked."""
    return asked.positive.prompt[-1].content.strip().split("\n")[0]


def _line(item: TracedItem) -> str:
    """The strongest latents and rows of an item, for the terminal."""
    latents = ", ".join(f"{k} ({v:+.3g})" for k, v in item.latents[:3]) or "none"
    rows = ", ".join(f"{r.id} ({r.score:+.3g})" for r in item.rows[:2]) or "none"
    return f"latents {latents}; rows {rows}"
