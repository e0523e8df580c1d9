"""Rows of real labelled data for the benchmarks of influence: a mixed set to score, and other pairs to ask with.

In: the folder of real_data.py's sets. Out: Examples labelled "bad" or "good". Of each question one answer is taken, so
that a row's twin is never in the set; queries come from questions of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.real_data import SETS, Pair
from curate.corpus.example import Example, Message
from curate.corpus.render import Rendered, Renderer
from curate.curvature.queries import QueryExample
from curate.errors import BadRow, ConfigError

BAD, GOOD = "bad", "good"
DATA = Path("../shared/data")
_TRIED = 8  # times as many pairs as are needed: many are too long


@dataclass(frozen=True)
class Mixed:
    """`rows` (every other one bad) with their tokens, and `queries`: bad answers with good ones to other questions."""

    rows: list[Example]
    rendered: list[Rendered]
    queries: list[QueryExample]

    @property
    def bad(self) -> list[bool]:
        return [row.label == BAD for row in self.rows]


def mixed(name: str, root: Path, rows: int, queries: int, renderer: Renderer) -> Mixed:
    """`rows` rows and `queries` pairs, spread over the data set `name`; what is too long to render is passed over.

    Raises:
        ConfigError: no such data, or too little of it.
    """
    if name not in SETS:
        raise ConfigError(f"there is no data set {name!r}; choose from {', '.join(SETS)}")
    if not root.is_dir():
        raise ConfigError(f"the folder {root} is not there; give the real data with --data")
    pairs = SETS[name](root, _TRIED * (rows + queries))
    asked_once = list({(tuple(p[0]), tuple(p[2])): p for p in pairs}.values())
    fitting = [p for p in asked_once if _fits(p, renderer)]
    if len(fitting) < rows + queries:
        raise ConfigError(f"{name} has {len(fitting)} pairs of fitting length, {rows + queries} are needed")
    # Spread evenly, with the queries between the rows.
    chosen = [fitting[i * len(fitting) // (rows + queries)] for i in range(rows + queries)]
    asked = {i * (rows + queries) // queries for i in range(queries)} if queries else set()
    mixed_rows: list[Example] = []
    asking: list[QueryExample] = []
    for i, (bad_prompt, bad, good_prompt, good) in enumerate(chosen):
        if i in asked:
            negative = _example(f"{name}-q{i}", i, good_prompt, good, GOOD)
            asking.append(QueryExample(f"{name}-q{i}", _example(f"{name}-q{i}", i, bad_prompt, bad, BAD), negative))
        elif len(mixed_rows) % 2 == 0:
            mixed_rows.append(_example(f"{name}-{i}", i, bad_prompt, bad, BAD))
        else:
            mixed_rows.append(_example(f"{name}-{i}", i, good_prompt, good, GOOD))
    return Mixed(mixed_rows, [renderer.render(e) for e in mixed_rows], asking)


def _example(name: str, row: int, prompt: Sequence[Message], response: str, label: str) -> Example:
    return Example(name, row, (*prompt, Message("assistant", response)), label=label)


def _fits(pair: Pair, renderer: Renderer) -> bool:
    bad_prompt, bad, good_prompt, good = pair
    try:
        renderer.render(_example("bad", 0, bad_prompt, bad, BAD))
        renderer.render(_example("good", 0, good_prompt, good, GOOD))
    except BadRow:
        return False
    return True
