"""The page of an SAE sweep: one HTML file with the choice of a layer, its pictures and its table.

In: a LayerSweep. Out: the page as text. Knows no model and no files.
"""

from __future__ import annotations

from typing import Any

from curate.evaluation.sae_insertion import LayerSweep
from curate.reports import sae_plots
from curate.reports.report import rendered

SIZES = (("wide", 920), ("narrow", 350))
# How a drop of the metric is called, by what more of the metric means.
_DROPS = {"capability": "drop of", "loss": "rise of", "trait": "change of", "count": "rise of"}


def build(sweep: LayerSweep, title: str) -> str:
    """The whole page. The same sweep gives the same text."""
    return rendered("sae_layers.html.j2", _context(sweep, title))


def _context(sweep: LayerSweep, title: str) -> dict[str, Any]:
    chosen, settings = sweep.of(sweep.chosen), sweep.facts.get("settings", {})
    called = _DROPS[sweep.metric.sense]
    first, last = sweep.layers[0].layer, sweep.layers[-1].layer
    alt = (
        f"Drop and explained variance for SAEs at the layers {first} to {last}; layer {sweep.chosen} is chosen; "
        f"all numbers are in the table"
    )
    return {
        "title": title,
        "sweep": sweep,
        "chosen": chosen,
        "called": called,
        "inside": sweep.middle[0] <= sweep.chosen <= sweep.middle[1],
        "costs": (chosen.drop.low if chosen.drop.low is not None else chosen.drop.value or 0.0) > 0,
        "settings": settings,
        "facts": _facts(sweep),
        "pictures": {
            size: sae_plots.layers(
                sweep, _short(called, size), f"layers-{size}", alt, width, 480 if width > 500 else 420
            )
            for size, width in SIZES
        },
        "curves": {
            size: sae_plots.curves(
                sweep, f"curves-{size}", f"Training error of {len(sweep.layers)} SAEs over tokens seen", width, 320
            )
            for size, width in SIZES
        },
        "trained": any(r.curve for r in sweep.layers),
    }


def _short(called: str, size: str) -> str:
    return f"{called} the metric" if size == "wide" else called.removesuffix(" of")


def _facts(sweep: LayerSweep) -> list[tuple[str, str]]:
    """What the SAEs are, as far as the settings say."""
    s = sweep.facts.get("settings", {})
    out: list[tuple[str, str]] = []
    if (model := sweep.facts.get("model")) is not None:
        adapter = ", its adapter merged" if model.get("adapter") else ""
        out.append(("model", f"{model.get('name', '?')}{adapter}"))
    if s:
        shape = f"{s['activation']}, {s['k']} of {s['latents']:,} latents active"
        if s["activation"] != "topk":
            shape = f"{s['activation']}, {s['latents']:,} latents"
        out.append(("SAE", shape))
        out.append(
            (
                "trained on",
                f"{'all tokens' if s['tokens'] == 'all' else 'tokens of the response'}, {s['epochs']} epochs",
            )
        )
        extra = [
            f"{name} {s[key]:g}" for name, key in (("orthogonality", "orthogonality"), ("task loss", "task")) if s[key]
        ]
        if extra:
            out.append(("also in the loss", ", ".join(extra)))
    if (rows := sweep.facts.get("rows")) is not None:
        out.append(("rows", f"{rows:,}"))
    out.append(("states not trained on", f"{sweep.layers[0].quality.tokens:,} tokens"))
    return out
