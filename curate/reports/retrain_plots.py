"""Pictures of a sweep: a measure against the share of rows removed, the Pareto of two measures, losses of trainings.

In: series of plain numbers with their labels. Out: inline SVG as in `plots`. Every series has a colour, a dash and a
marker of its own, and where there is room its name at its end, so that it is known without colour too.
Knows nothing of arms and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from curate.reports.plots import DASHES, SERIES, STAND_IN, blank, element, rc

MARKERS = ("o", "s", "^", "D", "v", "P")
BASE, FULL, CHANCE = "base model", "all rows", "random"
_LABEL = 11  # points
_LETTER = 5.9  # points that a letter of a label takes; the browser's font is not matplotlib's
_ROW = 13.0  # points between two labels


@dataclass(frozen=True)
class Look:
    """How a series is told from the others: colour, dash and marker 0–5."""

    colour: int
    dash: int
    marker: int

    @staticmethod
    def of(index: int) -> Look:
        """The index-th of 36 looks: the first six differ in all three."""
        return Look(index % 6, (index + index // 6) % 6, (index + index // 6) % 6)


@dataclass(frozen=True)
class Line:
    """A measure over the share removed, with the seeds' spread."""

    label: str
    look: Look
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Controls:
    """The same in every panel. chance: of random rankings. base, full: levels."""

    chance: Line | None
    base: float | None
    full: float | None


@dataclass(frozen=True)
class Size:
    """Of a picture: `width` of the whole, `height` of one panel, panels in a row, whether names stand at the lines."""

    width: int
    height: int
    across: int
    names: bool


def effect_curves(panels: Sequence[Panel], controls: Controls, title: str, size: Size, name: str, alt: str) -> Markup:
    """Measure against share of rows removed, one panel a mode, all to one scale; `title` names the measure."""
    down = -(-len(panels) // size.across)
    margin = _margin(panels, controls) if size.names else 14.0
    with matplotlib.rc_context(rc(name)):
        figure = blank(size.width, size.height * down)
        axes = _grid(figure, len(panels), size, right=margin, left=58.0, below=46.0, above=30.0)
        bottom, top = _limits(panels, controls)
        shares = sorted({x for p in panels for line in p.lines for x in line.x} | set(_chance_x(controls)))
        for i, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
            ax.set_ylim(bottom, top)
            _shares(ax, shares)
            _controls(ax, controls)
            _lines(ax, panel.lines)
            ax.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
            ax.yaxis.set_major_locator(MaxNLocator(5))
            if i % size.across == 0:
                ax.set_ylabel(title)
            else:
                ax.tick_params(labelleft=False)
            if i >= len(panels) - size.across:
                ax.set_xlabel("share of rows removed")
            if size.names:
                _name_ends(figure, ax, panel, controls)
        return element(figure, name, alt)


def _chance_x(controls: Controls) -> tuple[float, ...]:
    return controls.chance.x if controls.chance else ()


def _margin(panels: Sequence[Panel], controls: Controls) -> float:
    names = [line.label for p in panels for line in p.lines] + [label for label, _ in _levels(controls)]
    return 28 + _LETTER * max((len(n) for n in names), default=0)


def _levels(controls: Controls) -> list[tuple[str, float]]:
    found = [(BASE, controls.base), (FULL, controls.full)]
    levels = [(label, level) for label, level in found if level is not None]
    if controls.chance is not None:
        levels.append((CHANCE, controls.chance.y[-1]))
    return levels


def _grid(
    figure: Figure, n: int, size: Size, right: float, left: float, below: float, above: float, gap: float = 18.0
) -> list[Axes]:
    """n axes in rows of `size.across`, each with margins in points: room for names to the right of every one."""
    figure.set_layout_engine("none")
    width, height = (72 * v for v in figure.get_size_inches())
    down = -(-n // size.across)
    wide = (width - left - size.across * right - (size.across - 1) * gap) / size.across
    tall = height / down - below - above
    out = []
    for i in range(n):
        row, column = divmod(i, size.across)
        x = left + column * (wide + right + gap)
        y = height - (row + 1) * (height / down) + below
        out.append(figure.add_axes((x / width, y / height, wide / width, tall / height)))
    return out


def _limits(panels: Sequence[Panel], controls: Controls) -> tuple[float, float]:
    lines = [line for p in panels for line in p.lines] + ([controls.chance] if controls.chance else [])
    levels = [v for v in (controls.base, controls.full) if v is not None]
    everything = np.array([v for line in lines for v in (*line.y, *line.low, *line.high)] + levels, dtype=float)
    if not len(everything):
        return 0.0, 1.0
    low, high = float(everything.min()), float(everything.max())
    room = 0.07 * (high - low) or max(0.05 * abs(high), 0.5)
    return low - room, high + room


def _shares(ax: Axes, shares: Sequence[float]) -> None:
    if not shares:
        return
    low, high = shares[0], shares[-1]
    room = 0.05 * (high - low) or 0.1
    ax.set_xlim(low - room, high + room)
    if len(shares) <= 6 and (len(shares) == 1 or min(np.diff(shares)) >= 0.12 * (high - low)):
        ax.set_xticks(list(shares))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}%"))
    ax.grid(visible=False, axis="x")


def _controls(ax: Axes, controls: Controls) -> None:
    muted, ink = STAND_IN["muted"], STAND_IN["ink"]
    if controls.base is not None:
        ax.axhline(controls.base, color=ink, linewidth=1.2, linestyle=(0, (1, 2.5)))
    if controls.full is not None:
        ax.axhline(controls.full, color=ink, linewidth=1.2, linestyle=(0, (7, 3)))
    if controls.chance is not None:
        c = controls.chance
        if len(c.x) == 1:
            x0, x1 = ax.get_xlim()
            ax.fill_between([x0, x1], c.low[0], c.high[0], color=muted, alpha=0.25, linewidth=0)
            ax.plot([x0, x1], [c.y[0]] * 2, color=muted, linewidth=1.5)
        else:
            ax.fill_between(c.x, c.low, c.high, color=muted, alpha=0.25, linewidth=0)
            ax.plot(c.x, c.y, color=muted, linewidth=1.5)


def _lines(ax: Axes, lines: Sequence[Line]) -> None:
    single = all(len(line.x) == 1 for line in lines)
    x0, x1 = ax.get_xlim()
    for i, line in enumerate(lines):
        colour, marker = STAND_IN[SERIES[line.look.colour]], MARKERS[line.look.marker]
        # One share: side by side, with whiskers. Several: lines with bands.
        x = np.array(line.x) + ((i - (len(lines) - 1) / 2) * (x1 - x0) * 0.09 if single else 0.0)
        points: dict[str, Any] = {"marker": marker, "markersize": 5.5, "color": colour, "zorder": 3}
        if len(line.x) == 1:
            ax.vlines(x, line.low, line.high, color=colour, linewidth=2)
        else:
            ax.fill_between(x, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, line.y, linewidth=2, linestyle=DASHES[line.look.dash], **points)


def _name_ends(figure: Figure, ax: Axes, panel: Panel, controls: Controls) -> None:
    """Names to the right of the panel at the height of the lines' ends, moved apart where they would overlap."""
    ink, muted = STAND_IN["ink"], STAND_IN["muted"]
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    tall = 72 * ax.get_position().height * figure.get_size_inches()[1]
    single = all(len(line.x) == 1 for line in panel.lines)
    ends: list[tuple[float, str, str, float | None]] = [
        (line.y[-1], line.label, STAND_IN[SERIES[line.look.colour]], line.x[-1]) for line in panel.lines
    ]
    ends += [(y, label, muted if label == CHANCE else ink, None) for label, y in _levels(controls)]
    ends.sort(key=lambda e: e[0])
    wanted = [tall * (e[0] - y0) / (y1 - y0) for e in ends]
    for (y, label, colour, x), at in zip(ends, spread(wanted, _ROW, tall), strict=True):
        start = 1.0 if x is None or single else (x - x0) / (x1 - x0)
        arrow: dict[str, Any] = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        arrow["relpos"] = (0.0, 0.5)
        ax.annotate(
            label,
            (start, (y - y0) / (y1 - y0)),
            (1 + 16 / (72 * ax.get_position().width * figure.get_size_inches()[0]), at / tall),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=_LABEL,
            color=ink,
            arrowprops=arrow,
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float, length: float) -> list[float]:
    """Places near the rising `wanted` ones, at least `gap` apart, within [0, length] where they fit into it.

    The least squares answer (pool adjacent violators): neighbours that would overlap stand around their common mean.
    """
    blocks: list[tuple[float, int]] = []  # (mean of wanted − offset, members)
    for i, at in enumerate(wanted):
        blocks.append((at - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append(((a * n + b * m) / (n + m), n + m))
    offsets = [mean for mean, members in blocks for _ in range(members)]
    last = max(0.0, length - (len(wanted) - 1) * gap)
    return [min(max(offset, 0.0), last) + i * gap for i, offset in enumerate(offsets)]


@dataclass(frozen=True)
class Point:
    """An arm in the plane of two measures. number: as it is listed beside the picture, for points of the front."""

    x: float
    y: float
    look: Look | None  # None: a control
    kind: str  # most, least, random, full, base
    number: int | None = None


def pareto(
    points: Sequence[Point],
    front: Sequence[tuple[float, float]],
    titles: tuple[str, str],
    better: tuple[int, int],
    name: str,
    alt: str,
    width: int = 460,
    height: int = 380,
) -> Markup:
    """Every arm by two measures; the front as steps. better: per axis +1 where more is better, else −1."""
    ink, muted = STAND_IN["ink"], STAND_IN["muted"]
    signs = {"random": "x", "full": "*", "base": "p"}
    with matplotlib.rc_context(rc(name)):
        figure = blank(width, height)
        ax = figure.add_subplot()
        if len(front) > 1:
            xs, ys = zip(*front, strict=True)
            # Between two points of the front the worse of both values is what can be had for sure.
            steps = "steps-post" if better[0] < 0 else "steps-pre"
            ax.plot(xs, ys, drawstyle=steps, color=ink, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        for p in points:
            if p.look is None:
                colour = muted if p.kind == "random" else ink
                big = 11 if p.kind == "full" else 8
                ax.plot(p.x, p.y, signs[p.kind], color=colour, markersize=big, markeredgewidth=1.5, zorder=3)
                continue
            colour = STAND_IN[SERIES[p.look.colour]]
            face = colour if p.kind == "most" else "none"
            ax.plot(
                p.x, p.y, MARKERS[p.look.marker], color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.5
            )  # fmt: skip
        _numbers(ax, [p for p in points if p.number is not None], better)
        ax.set_xlabel(titles[0])
        ax.set_ylabel(titles[1])
        ax.margins(0.09)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(6))
        return element(figure, name, alt)


def _numbers(ax: Axes, points: Sequence[Point], better: tuple[int, int]) -> None:
    """On the side of the better values, where there are no other points."""
    for p in points:
        across, up = 8 * better[0], 8 * better[1]
        ax.annotate(
            str(p.number),
            (p.x, p.y),
            (across, up),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_LABEL,
            color=STAND_IN["ink"],
            fontweight="bold",
        )


@dataclass(frozen=True)
class Losses:
    """Losses of the trainings of one panel: (colour 0–5 or None for ink, dash, steps, losses)."""

    title: str
    lines: tuple[tuple[int | None, int, tuple[int, ...], tuple[float, ...]], ...]


def loss_curves(panels: Sequence[Losses], size: Size, name: str, alt: str) -> Markup:
    """Training loss over optimizer steps, a thin line a training, all panels to one scale."""
    down = -(-len(panels) // size.across)
    values = np.array([v for p in panels for *_, ys in p.lines for v in ys if np.isfinite(v)], dtype=float)
    last = max((x for p in panels for _, _, xs, _ in p.lines for x in xs), default=1)
    low, high = np.percentile(values, [0, 99.5]) if len(values) else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.1
    with matplotlib.rc_context(rc(name)):
        figure = blank(size.width, size.height * down)
        axes = _grid(figure, len(panels), size, right=10.0, left=58.0, below=44.0, above=28.0)
        for i, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
            for colour, dash, xs, ys in panel.lines:
                drawn = STAND_IN["ink"] if colour is None else STAND_IN[SERIES[colour]]
                dots = "o" if len(xs) == 1 else None
                ax.plot(
                    xs, ys, color=drawn, linewidth=1.1, alpha=0.75, linestyle=DASHES[dash], marker=dots, markersize=4
                )
            ax.set_ylim(low - room, high + room)
            ax.set_xlim(0, last * 1.02)
            ax.set_title(panel.title, loc="left", fontsize=11)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(4))
            if i % size.across == 0:
                ax.set_ylabel("loss")
            else:
                ax.tick_params(labelleft=False)
            if i >= len(panels) - size.across:
                ax.set_xlabel("step")
        return element(figure, name, alt)
