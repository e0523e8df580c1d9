"""What a reader of a sweep must know before believing it, in sentences made from the arms themselves.

In: RetrainData and its groups. Out: (kind, sentence) pairs, "warning" or "note". Knows no HTML.
"""

from __future__ import annotations

from collections.abc import Sequence

from curate.reports.retrain_data import RetrainData
from curate.reports.retrain_effect import Group

MANY_MISSING = 0.2
FEW_SEEDS = 3


def notes(data: RetrainData, found: Sequence[Group]) -> list[tuple[str, str]]:
    """Warnings first, then notes; those that the caller gave are notes."""
    made = [
        *_controls(found),
        *_seeds(data, found),
        *_failed(data),
        *_missing(data),
        *_intervals(data, found),
        *_shared(data),
    ]
    made += [("note", note) for note in data.notes]
    return [n for n in made if n[0] == "warning"] + [n for n in made if n[0] == "note"]


def _controls(found: Sequence[Group]) -> list[tuple[str, str]]:
    have = {g.kind for g in found if g.values}
    out = []
    if "random" not in have:
        text = "No random ranking was trained: what removing rows does whatever their score is not known."
        out.append(("warning", text))
    if "full" not in have:
        out.append(("note", "No model was trained on all rows."))
    if "base" not in have:
        out.append(("note", "The model as it was before training was not measured."))
    return out


def _seeds(data: RetrainData, found: Sequence[Group]) -> list[tuple[str, str]]:
    counts = {
        len({a.seed for a in g.arms if data.value(a, data.trait) is not None}) for g in found if g.kind == "method"
    }
    counts.discard(0)
    if not counts:
        return [("warning", "No arm of a method was measured.")]
    if max(counts) == 1:
        text = "One seed: how much of a difference is the training's own luck is not known, and there is no interval."
        return [("warning", text)]
    words = f"{min(counts)}" if len(counts) == 1 else f"between {min(counts)} and {max(counts)}"
    text = f"Each point of a method is the mean of {words} seeds; its band is the lowest and the highest of them."
    if max(counts) < FEW_SEEDS:
        text += " That is few: the interval over seeds is very wide, and zero lies in it easily."
    return [("note", text)]


def _failed(data: RetrainData) -> list[tuple[str, str]]:
    failed = sum(a.failed is not None for a in data.arms)
    if not failed:
        return []
    be = "arms failed and is" if failed == 1 else "arms failed and are"
    return [("warning", f"{failed:,} of {len(data.arms):,} {be} in no curve and no mean; see the list below.")]


def _missing(data: RetrainData) -> list[tuple[str, str]]:
    """Questions without a value: a refusal, an unreadable answer or judgement."""
    out = []
    for key, metric in data.metrics.items():
        found = [a.measures[key] for a in data.arms if a.failed is None and key in a.measures]
        asked, missing = sum(m.n + m.missing for m in found), sum(m.missing for m in found)
        worst = max((m.missing / (m.n + m.missing) for m in found if m.missing), default=0.0)
        if missing:
            kind = "warning" if key == data.trait and worst > MANY_MISSING else "note"
            text = (
                f"{_begins(metric.title)}: {missing:,} of {asked:,} questions have no value (refused or unreadable) "
                f"and count in no mean; at worst {100 * worst:.3g}% of an arm's."
            )
            out.append((kind, text))
    live = [a for a in data.arms if a.failed is None]
    absent = [a for a in live if data.value(a, data.trait) is None]
    if absent:
        named = ", ".join(a.name for a in absent[:5]) + (" and others" if len(absent) > 5 else "")
        text = f"{len(absent):,} of {len(live):,} arms have no value of {data.metrics[data.trait].title}: {named}."
        out.append(("warning", text))
    return out


def _begins(title: str) -> str:
    return title[:1].upper() + title[1:]


def _intervals(data: RetrainData, found: Sequence[Group]) -> list[tuple[str, str]]:
    sizes = {a.measures[data.trait].n for g in found for a in g.arms if data.value(a, data.trait) is not None}
    if not sizes:
        return []
    many = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    text = (
        f"Two kinds of luck, never added up here: of the questions (intervals in the table: 95% bootstrap over {many} "
        f"answers of an arm) and of the training (bands and intervals over seeds). All arms answer the same questions, "
        f"so differences between arms are surer than the table's intervals make them look."
    )
    return [("note", text)]


def _shared(data: RetrainData) -> list[tuple[str, str]]:
    live = [a for a in data.arms if a.training is not None and a.failed is None]
    saved = len(live) - len({a.training for a in live})
    if not saved:
        return []
    return [("note", f"{saved:,} arms train on the same rows with the same seed as another one and share its model.")]
