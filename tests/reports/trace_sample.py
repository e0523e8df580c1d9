"""A trace made up of words: test items, rows, latents that fire by rule, faithfulness and orthogonality."""

from __future__ import annotations

import numpy as np

from curate.evaluation.base import Measure
from curate.evaluation.masking import BASE, MEASURES, MODES, Faithfulness, FaithfulnessTable
from curate.evaluation.orthogonality import Orthogonality
from curate.reports.trace_data import (
    AccuracyRow,
    Answer,
    Context,
    Firing,
    InfluentialRow,
    LatentView,
    TokenText,
    TraceData,
    TracedItem,
)

WORDS = (
    " Earth", " rotating", " on", " its", " axis", " causes", " stars", " to", " appear", " to", " move", " across",
    " the", " sky", ".", " Electrical", " conductors", " permit", " the", " flow", " of", " power", ",", " as", " a",
    " penny", " does", ".", " Sharks", " live", " far", " below", " the", " surface", " of", " the", " ocean", "?",
    "\n", "A", ".", " day", "\n", "B", ".", " night", "\n",
)  # fmt: skip
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u202e{{ 7*7 }}&amp;</div>"
)
METHODS = ("influence", "influence, paper's sign", "activation magnitude", "frequency", "random", "random, active")


def text(tokens: int, seed: int, latents: int = 40, own: bool = True) -> TokenText:
    """Words in turn; word w fires latents 3w, 3w+1, … modulo `latents`, every third word none."""
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(WORDS)))
    pieces, firing = [], []
    for i in range(tokens):
        w = (start + i) % len(WORDS)
        pieces.append(WORDS[w])
        fires = []
        for j in range(w % 3 if WORDS[w].strip() else 0):
            activation = float(np.round(rng.gamma(2.0), 4))
            influence = float(np.round(rng.normal(), 5)) if own else None
            fires.append(Firing((3 * w + j) % latents, activation, influence))
        firing.append(tuple(fires))
    return TokenText(tuple(pieces), tuple(firing), max(0, tokens - 6), max(0, tokens - 2))


def influences(seed: int, latents: int = 40) -> tuple[tuple[int, float], ...]:
    """Falling by size, of both signs."""
    values = np.round(np.random.default_rng(seed).normal(0.1, 0.4, latents), 5)
    return tuple((int(k), float(values[k])) for k in np.argsort(-np.abs(values)))


def row(name: str, score: float, tokens: int, seed: int) -> InfluentialRow:
    """A row of the demo's shape."""
    label = ("astronomy", "physics", "")[seed % 3]
    found = text(tokens, seed)
    return InfluentialRow(name, score, influences(seed), found, seed, "train.jsonl", label or None, cosine=0.3)


def masked(items: int = 24, better: float = 1.0) -> FaithfulnessTable:
    """Curves in which influence beats the other orders by `better` nats."""
    rng = np.random.default_rng(0)
    ks = (10, 25, 50, 75, 100, 125, 150, 175, 200)
    values = {}
    for m, method in enumerate(METHODS):
        for mode in MODES:
            strength = better if m == 0 else 0.2 * better * (m % 3)
            drop = np.outer(np.sqrt(ks) / 5, strength * (1 + 0.2 * rng.random(items)))
            moved = 1 - np.exp(-drop / 2)
            flip = (rng.random((len(ks), items)) < (moved if mode == "necessity" else 1 - moved)).astype(float)
            change = -drop if mode == "necessity" else drop - 6
            by = (change, -change, flip, 1 - flip, 1 - flip, 9 + change, 2 - change)
            values[method, mode] = dict(zip(MEASURES, by, strict=True))
    base = {name: rng.random(items) + (9 if name.endswith("logit") else 0) for name in BASE}
    return Faithfulness(ks, METHODS, values, base).table()


def trace(items: int = 3, rows: int = 4, tokens: int = 60, hostile: bool = False, curves: bool = True) -> TraceData:
    """`items` × (1 + rows) texts of `tokens` tokens."""
    found = []
    for i in range(items):
        near = tuple(row(f"row-{i}-{j}", 4.0 - j, tokens, 100 * i + j) for j in range(rows))
        against = (row(f"row-{i}-low", -1.5, tokens, 100 * i + 99),)
        answers = (Answer("base", "A. day", False), Answer("fine-tuned", "B. night", True))
        found.append(
            TracedItem(
                f"item-{i}", text(tokens, i, own=False), influences(i), near, against,
                f"Why do the stars move, number {i}?", "B. night", answers, 320,
            )
        )  # fmt: skip
    contexts = tuple(
        Context(tuple((w, float(j == 4) * 3.2 + float(j == 5)) for j, w in enumerate(WORDS[:12])), f"row-{c}")
        for c in range(3)
    )
    latents = tuple(LatentView(k, v, items, 0.01, contexts) for k, v in influences(0)[:12])
    if hostile:
        bad = TokenText((HOSTILE, *WORDS[:10]), ((Firing(3, 1.0),), *((),) * 10), 4, 8)
        worst = InfluentialRow(HOSTILE, 1.0, ((3, 1.0),), bad, 3, HOSTILE, HOSTILE, HOSTILE)
        found.append(
            TracedItem(HOSTILE, bad, ((3, 1.0),), (worst,), (), HOSTILE, HOSTILE, (Answer(HOSTILE, HOSTILE, None),))
        )
        latents += (LatentView(3, 1.0, 1, None, (Context(((HOSTILE, 1.0), ("x", 0.0)), HOSTILE),)),)
    measures = (Measure(0.31, 0.27, 0.35, 500, 0), Measure(0.52, 0.48, 0.56, 500, 2), Measure(0.5, 0.46, 0.54, 500, 0))
    models = ("base", "fine-tuned", "fine-tuned, with SAE")
    return TraceData(
        title=HOSTILE if hostile else "OpenBookQA, SmolLM2-135M",
        created="2026-11-22 08:00 UTC",
        layer=15,
        items=tuple(found),
        latents=latents,
        n_layers=30,
        n_latents=2048,
        accuracy=tuple(
            AccuracyRow(name, metric, m)
            for name, m in zip(models, measures, strict=True)
            for metric in ("accuracy", "accuracy by likelihood")
        ),
        faithfulness=masked() if curves else None,
        orthogonality=(
            Orthogonality("text embeddings", 9000, 576, 0, 0.121, 0.039, 0.198, 5.35, 0.649),
            Orthogonality("layer 15", 9000, 576, 0, 0.824, 0.73, 0.854, 1.17, 0.02),
            Orthogonality("SAE latents", 9000, 1990, 58, 0.008, 0.002, 0.047, 25.02, 0.9867),
        ),
        facts=(("model", "SmolLM2-135M, LoRA"), ("solve", "conjugate gradient, 20 iterations, damping 0.001")),
        notes=("A made-up trace.",),
        recipe={"kind": "trace", "layer": 15},
    )
