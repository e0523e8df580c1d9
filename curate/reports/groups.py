"""The page of `curate groups`: the groups of the highest influence, what taking whole groups covers, what is removed.

In: GroupsPage. Out: the page as text. Knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from curate.reports import group_plots
from curate.reports.group_plots import Path, thinned
from curate.reports.passages import Passage
from curate.reports.report import rendered
from curate.reports.words import column
from curate.selection.groups import Curve

LABELS = 5  # colours that the bars have, the rest are taken together


@dataclass(frozen=True)
class GroupView:
    """A group as the table shows it: `place` 1 = taken first. labels: (name, members with it), commonest first.
    new: members that no group before it has."""

    latent: int
    place: int
    influence: float
    members: int
    new: int
    taken: bool
    labels: tuple[tuple[str, int], ...]
    passages: tuple[Passage, ...] = ()


@dataclass(frozen=True, eq=False)
class GroupsPage:
    """`curves`: by "influence", "rows" (single rows) and "random" (a list, one a draw). `base_rate`: share of bad rows
    among those with a label; None where no label is called bad. `labels`: names in order, for colours."""

    title: str
    column: str
    rule: str
    threshold: float
    aggregate: str
    most: bool
    fraction: float
    rows: int
    groups: int
    removed_groups: int
    removed_rows: int
    removed_bad: int | None
    bad_label: str | None
    bad_rows: int | None
    base_rate: float | None
    labels: tuple[str, ...]
    influence: Curve
    rows_curve: Curve
    random: Sequence[Curve]
    listed: Sequence[GroupView]
    written: str | None
    facts: tuple[tuple[str, str], ...]


def build(page: GroupsPage) -> str:
    """The whole page. The same data gives the same text."""
    return rendered("groups.html.j2", _context(page), ("page.css", "groups.css"))


def _context(page: GroupsPage) -> dict[str, Any]:
    coverage = [_path("groups by influence", page.influence, page.influence.taken, page.influence.covered, 0)]
    precision = [_path("groups by influence", page.influence, page.influence.covered, page.influence.precision, 0)]
    if page.bad_label is not None:
        precision.append(
            _path("single rows by score", page.rows_curve, page.rows_curve.covered, page.rows_curve.precision, 1)
        )
    if page.random:
        coverage.append(_random(page.random, "covered"))
        if page.bad_label is not None:
            precision.append(_random(page.random, "precision"))
    pictures = {
        "coverage": _sizes(
            "coverage", coverage, None, float(page.removed_groups), ("groups taken", "rows covered"), (False, True)
        ),
    }
    if page.bad_label is not None:
        labels = ("rows covered", "of them bad")
        pictures["precision"] = _sizes("precision", precision, page.base_rate, page.fraction, labels, (True, True))
    colours = {name: k for k, name in enumerate(page.labels[:LABELS])}
    return {
        "page": page,
        "score": column(page.column),
        "pictures": pictures,
        "legends": {"coverage": coverage, "precision": precision},
        "bars": [_bar(g, colours) for g in page.listed],
        "label_legend": [(name, k) for name, k in colours.items()]
        + ([("others", 5)] if len(page.labels) > LABELS else []),
        "largest": max((g.members for g in page.listed), default=1),
    }


def _path(name: str, curve: Curve, x: np.ndarray, y: np.ndarray, colour: int) -> Path:
    at = thinned(len(curve.taken))
    return Path(name, np.asarray(x, dtype=float)[at], y[at], colour)


def _random(curves: Sequence[Curve], what: str) -> Path:
    """The mean over draws and the band of 90 % of them; over rows covered by interpolation on one grid, from where half
    of the draws have begun."""
    name = f"groups in random order ({len(curves)} draws)"
    if what == "covered":
        y = np.stack([c.covered for c in curves])
        at = thinned(y.shape[1])
        low, high = np.quantile(y[:, at], [0.05, 0.95], axis=0)
        return Path(name, curves[0].taken[at].astype(float), y[:, at].mean(0), 2, low, high)
    starts = np.array([float(c.covered[0]) for c in curves])
    grid = np.linspace(float(np.median(starts)), min(float(c.covered[-1]) for c in curves), 200)
    y = np.stack([np.interp(grid, c.covered, c.precision, left=np.nan) for c in curves])
    low, high = np.nanquantile(y, [0.05, 0.95], axis=0)
    return Path(name, grid, np.nanmean(y, axis=0), 2, low, high)


def _sizes(
    name: str,
    paths: Sequence[Path],
    across: float | None,
    at: float,
    labels: tuple[str, str],
    shares: tuple[bool, bool],
) -> dict[str, Markup]:
    alt = f"{labels[1]} over {labels[0]}: {', '.join(p.name for p in paths)}"
    return {
        size: group_plots.curves(paths, across, at, labels, f"{name}-{size}", alt, width, height, shares)
        for size, width, height in (("wide", 460, 340), ("narrow", 350, 280))
    }


def _bar(group: GroupView, colours: dict[str, int]) -> list[dict[str, Any]]:
    """Segments of a group's bar: share of its members, where it begins, colour, name and count."""
    out: list[dict[str, Any]] = []
    start = 0.0
    others = sum(n for name, n in group.labels if name not in colours)
    named = sorted(((name, n) for name, n in group.labels if name in colours), key=lambda x: colours[x[0]])
    none = group.members - sum(n for _, n in group.labels)
    for name, n in [*named, ("others", others), ("no label", none)]:
        if n:
            share = n / group.members
            colour = colours.get(name, 5 if name == "others" else None)
            out.append({"name": name, "n": n, "share": share, "start": start, "colour": colour})
            start += share
    return out
