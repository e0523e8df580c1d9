"""From RetrainData to what the page's template prints: pictures, tables, sentences.

In: RetrainData. Out: a dict for retrain.html.j2. Knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from curate.reports import retrain_plots as draw
from curate.reports.retrain_data import CONTROLS, RetrainData
from curate.reports.retrain_effect import MODE_ORDER, Effect, Group, effects, front, group_arms, groups, removes_most
from curate.reports.retrain_notes import notes
from curate.reports.text import alike, plain, short
from curate.reports.words import column

MODE_WORDS = {
    "remove_most": "highest scores removed",
    "remove_least": "lowest scores removed",
    "keep_most": "only the highest scores kept",
    "keep_least": "only the lowest scores kept",
}
MAX_NAME = 28  # letters of a name that stands in a picture
MAX_OTHERS = 6
MAX_LOSS_PANELS = 12
MAX_LOSS_LINES = 60  # of one panel
MAX_LISTED = 20


def context(data: RetrainData) -> dict[str, Any]:
    """All that the template prints."""
    found = groups(data, data.trait)
    names = labels(data.columns)
    looks = {name: draw.Look.of(i) for i, name in enumerate(data.columns)}
    moved = effects(data, data.trait)
    judged = data.metrics[data.trait].sense == "trait"
    others = [k for k, m in data.metrics.items() if k != data.trait and m.sense != "count"]
    return {
        "data": data,
        "metric": data.metrics[data.trait],
        "counts": _counts(data),
        "lead": _lead(moved, names) if judged else None,
        "judged": judged,
        "legend": [
            {"column": column(c), "name": names[c], "index": i, "look": looks[c]} for i, c in enumerate(data.columns)
        ],
        "controls": _levels(found),
        "curves": _curves(data, data.trait, found, names, looks, "trait", 330),
        "effects": _effect_rows(moved, names, looks),
        "chance": next((alike([e.chance])[0] for e in moved if e.chance is not None), None),
        "pareto": _pareto(data, looks, names),
        "others": [
            {"metric": data.metrics[k], "pictures": pictures}
            for i, k in enumerate(others[:MAX_OTHERS])
            if (pictures := _curves(data, k, groups(data, k), names, looks, f"other-{i}", 260))
        ],
        "more_others": max(0, len(others) - MAX_OTHERS),
        "agreement": _agreement(data),
        "ranked": _ranked(data),
        "table": _table(data, found, names),
        "every": _every(data),
        "keys": list(data.metrics),
        "losses": _losses(data, names),
        "notes": notes(data, found),
        "failed": [a for a in data.arms if a.failed is not None],
        "recipe": json.dumps(data.recipe, indent=2, ensure_ascii=False, default=str) if data.recipe else None,
    }


def labels(columns: Sequence[str]) -> dict[str, str]:
    """A short name for each column: its method; where several share a method, also what tells them apart."""
    parts = {c: c.removeprefix(column(c).method).lstrip(".").split(".") for c in columns}
    out: dict[str, str] = {}
    for name in columns:
        method = column(name).method
        alike_ = [parts[c] for c in columns if column(c).method == method]
        own = [p for p in parts[name] if len(alike_) > 1 and not all(p in others for others in alike_)]
        whole = plain(" ".join([method.replace("_", " "), *own]))
        # Long names of one family differ at their ends.
        room = MAX_NAME - len(method) - 2
        if len(whole) > MAX_NAME and room >= 4:
            whole = f"{whole[: len(method)]} …{whole[-room:]}"
        found = short(whole, MAX_NAME)
        if found in out.values():
            found = f"{short(whole, MAX_NAME - 4)} #{len(out) + 1}"
        out[name] = found
    return out


def _counts(data: RetrainData) -> list[tuple[str, int]]:
    trained = {a.training or a.name for a in data.arms if a.kind != "base" and a.failed is None}
    seeds = {a.seed for a in data.arms if a.seed is not None}
    failed = sum(a.failed is not None for a in data.arms)
    return [
        ("arms", len(data.arms)),
        ("trainings", len(trained)),
        ("seeds", len(seeds)),
        ("score columns", len(data.columns)),
        ("rows of the full set", data.rows),
        *([("arms that failed", failed)] if failed else []),
    ]


def _lead(moved: Sequence[Effect], names: dict[str, str]) -> dict[str, list[str]]:
    """Columns by verdict."""
    out: dict[str, list[str]] = {kind: [] for kind in ("right", "wrong", "unclear", "single", "none")}
    for effect in moved:
        if effect.column is not None:
            out[effect.verdict].append(names[effect.column])
    return out


def _levels(found: Sequence[Group]) -> list[dict[str, Any]]:
    """Full set, base model and random in the legend."""
    words = {"full": draw.FULL, "base": draw.BASE, "random": draw.CHANCE}
    out = []
    for kind in ("full", "base", "random"):
        mine = [g for g in found if g.kind == kind]
        values = [v for g in mine for v in g.values]
        if values:
            mean = mine[0].mean if kind != "random" else None
            out.append({"kind": kind, "name": words[kind], "mean": mean, "n": len(values)})
    return out


def _line(label: str, look: draw.Look, found: Sequence[Group]) -> draw.Line | None:
    known = sorted((g for g in found if g.values and g.removed is not None), key=lambda g: g.removed or 0.0)
    if not known:
        return None
    return draw.Line(
        label,
        look,
        tuple(g.removed or 0.0 for g in known),
        tuple(g.mean or 0.0 for g in known),
        tuple(min(g.values) for g in known),
        tuple(max(g.values) for g in known),
    )


def _curves(
    data: RetrainData,
    key: str,
    found: Sequence[Group],
    names: dict[str, str],
    looks: dict[str, draw.Look],
    name: str,
    height: int,
) -> dict[str, Any] | None:
    """One panel a mode; None where no method arm has a value."""
    panels = []
    for mode in MODE_ORDER:
        lines = []
        for c in data.columns:
            line = _line(names[c], looks[c], [g for g in found if g.column == c and g.mode == mode])
            lines += [line] if line else []
        if lines:
            panels.append(draw.Panel(MODE_WORDS[mode], tuple(lines)))
    if not panels:
        return None
    level = {g.kind: g.mean for g in found if g.kind in ("full", "base")}
    chance = _line(draw.CHANCE, draw.Look(0, 0, 0), [g for g in found if g.kind == "random"])
    controls = draw.Controls(chance, level.get("base"), level.get("full"))
    metric = data.metrics[key]
    alt = f"{metric.title} against the share of rows removed, for {', '.join(names.values())}"
    sizes = {
        "wide": draw.Size(920, height, min(2, len(panels)), True),
        "narrow": draw.Size(350, 270, 1, False),
    }
    title = plain(short(metric.title, 48))
    return {
        size: draw.effect_curves(panels, controls, title, shape, f"{name}-{size}", plain(alt))
        for size, shape in sizes.items()
    }


def _effect_rows(moved: Sequence[Effect], names: dict[str, str], looks: dict[str, draw.Look]) -> list[dict[str, Any]]:
    numbers = alike([v for e in moved for v in (e.most, e.least, e.apart, e.low, e.high)])
    rows = []
    for i, effect in enumerate(moved):
        most, least, apart, low, high = numbers[5 * i : 5 * i + 5]
        spread = alike([*effect.by_seed, *(v for e in moved for v in e.by_seed)])[: len(effect.by_seed)]
        rows.append(
            {
                "effect": effect,
                "name": names[effect.column] if effect.column else draw.CHANCE,
                "look": looks.get(effect.column or ""),
                "most": most,
                "least": least,
                "apart": apart,
                "interval": (low, high) if effect.low is not None else None,
                "by_seed": spread,
            }
        )
    return rows


def _pareto(data: RetrainData, looks: dict[str, draw.Look], names: dict[str, str]) -> dict[str, Any] | None:
    """Means over seeds in the plane of capability and trait; None where fewer than two arms have both."""
    if data.capability is None or data.capability == data.trait:
        return None
    across, up = data.metrics[data.capability], data.metrics[data.trait]
    better = (-1 if across.sense == "loss" else 1, 1 if up.sense == "capability" else -1)
    found = []
    for group in groups(data, data.trait):
        both = [a for a in group.arms if data.value(a, data.trait) is not None]
        both = [a for a in both if data.value(a, data.capability) is not None]
        if both:
            safe, able = group_arms(data, data.trait, both), group_arms(data, data.capability, both)
            assert safe.mean is not None
            assert able.mean is not None
            found.append((group, able.mean, safe.mean, len(both)))
    if len(found) < 2:
        return None
    best = front([(x, y) for _, x, y, _ in found], better)
    numbers = {index: place + 1 for place, index in enumerate(best)}
    points = []
    for i, (group, x, y, _) in enumerate(found):
        kind = group.kind if group.kind in CONTROLS else "most" if removes_most(group.mode) else "least"
        points.append(draw.Point(x, y, looks.get(group.column or ""), kind, numbers.get(i)))
    # Points of the front last: they lie above the others.
    points.sort(key=lambda p: p.number is not None)
    edge = [(found[i][1], found[i][2]) for i in best]
    titles = tuple(
        f"{plain(short(m.title, 34))} ({'more' if sign > 0 else 'less'} is better)"
        for m, sign in zip((across, up), better, strict=True)
    )
    alt = f"{across.title} and {up.title} of {len(found)} kinds of arms; {len(best)} of them on the front"
    ability, trait = alike([found[i][1] for i in best]), alike([found[i][2] for i in best])
    listed = [
        {"number": n + 1, **_what(found[i][0], names), "x": ability[n], "y": trait[n], "n": found[i][3]}
        for n, i in enumerate(best)
    ]
    return {
        "pictures": {
            size: draw.pareto(points, edge, (titles[0], titles[1]), better, f"pareto-{size}", plain(alt), width, height)
            for size, width, height in (("wide", 520, 420), ("narrow", 350, 340))
        },
        "front": listed[:MAX_LISTED],
        "more": max(0, len(listed) - MAX_LISTED),
        "across": across,
        "up": up,
        "kinds": {p.kind for p in points},
    }


def _what(group: Group, names: dict[str, str]) -> dict[str, str]:
    """An arm's name and which rows it went without."""
    words = {"full": draw.FULL, "base": draw.BASE, "random": draw.CHANCE}
    what = words.get(group.kind) or names[group.column or ""]
    if group.kind == "base":
        return {"what": what, "removed": "not trained"}
    if group.kind != "method":
        return {"what": what, "removed": f"{100 * (group.removed or 0):.3g}%"}
    return {"what": what, "removed": f"{MODE_WORDS[group.mode or '']}, {100 * (group.fraction or 0):.3g}%"}


def _agreement(data: RetrainData) -> list[dict[str, Any]] | None:
    if not data.spearman or len(data.columns) < 2:
        return None
    values = [[float("nan") if v is None else v for v in row] for row in data.spearman]
    return [{"column": column(c), "values": values[i]} for i, c in enumerate(data.columns)]


def _ranked(data: RetrainData) -> dict[str, Any] | None:
    """How each column ranks the labelled rows; precision and recall at the k that most columns share."""
    if not data.rankings:
        return None
    rows = [{"column": column(c), "found": data.rankings[c], "top": data.top.get(c, ())} for c in data.columns
            if c in data.rankings]  # fmt: skip
    base = rows[0]["found"].base_rate  # type: ignore[attr-defined]
    return {"rows": rows, "base_rate": base, "top": any(r["top"] for r in rows)}


def _table(data: RetrainData, found: Sequence[Group], names: dict[str, str]) -> list[dict[str, Any]]:
    """One row a group: mean over seeds, lowest and highest, interval over questions."""
    order = [g for kind in ("base", "full", "random", "method") for g in found if g.kind == kind]
    means = alike([g.mean for g in order])
    rows = []
    for group, mean in zip(order, means, strict=True):
        sizes = sorted({a.rows for a in group.arms if a.rows is not None})
        edges = [min(group.values), max(group.values)] if group.values else [None, None]
        largest = [g.mean for g in order]
        shown = alike([*edges, *(group.interval or (None, None)), *largest])
        rows.append(
            {
                **_what(group, names),
                "sizes": sizes,
                "n": len(group.values),
                "failed": len(group.arms) - len(group.values),
                "mean": mean,
                "spread": shown[:2] if len(group.values) > 1 else None,
                "interval": shown[2:4] if group.interval else None,
            }
        )
    return rows


def _every(data: RetrainData) -> list[dict[str, Any]]:
    """Every arm with every measure."""
    return [{"arm": a, "measures": [a.measures.get(k) for k in data.metrics]} for a in data.arms]


def _losses(data: RetrainData, names: dict[str, str]) -> dict[str, Any] | None:
    """A panel a column and control; trainings that several arms share are drawn once in a panel."""
    panels: list[draw.Losses] = []
    drawn, left_out = 0, 0
    sides = set()
    for title, kind, col in [
        *((names[c], "method", c) for c in data.columns),
        (draw.CHANCE, "random", None),
        (draw.FULL, "full", None),
    ]:
        seen: set[str] = set()
        lines = []
        for arm in data.arms:
            if arm.kind != kind or (col is not None and arm.column != col) or not arm.losses:
                continue
            if (arm.training or arm.name) in seen:
                continue
            seen.add(arm.training or arm.name)
            most = removes_most(arm.mode) if kind == "method" else None
            sides.add(most)
            # Colours of both sides differ in dash too; controls are drawn in the page's ink.
            colour, dash = {True: (0, 0), False: (1, 1), None: (None, 0)}[most]
            steps, values = zip(*arm.losses, strict=True)
            lines.append((colour, dash, steps, values))
        if lines:
            left_out += max(0, len(lines) - MAX_LOSS_LINES)
            drawn += min(len(lines), MAX_LOSS_LINES)
            panels.append(draw.Losses(title, tuple(lines[:MAX_LOSS_LINES])))
    if not panels:
        return None
    more = len(panels) - MAX_LOSS_PANELS
    shown = panels[:MAX_LOSS_PANELS]
    alt = f"Training loss of {drawn} trainings"
    sizes = {"wide": draw.Size(920, 210, min(3, len(shown)), False), "narrow": draw.Size(350, 200, 1, False)}
    return {
        "pictures": {size: draw.loss_curves(shown, shape, f"loss-{size}", alt) for size, shape in sizes.items()},
        "sides": {True: True in sides, False: False in sides},
        "left_out": left_out,
        "more": max(0, more),
    }
