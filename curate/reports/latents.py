"""The page of `curate latents`: which SAE latents tell two sets of rows apart, and where they fire.

In: LatentsPage. Out: the page as text. Knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from curate.reports.passages import Passage
from curate.reports.report import rendered


@dataclass(frozen=True)
class SeparatingLatent:
    """One latent; see `evaluation.separating.Separation` for what the numbers are. `concept`: the name of its file."""

    latent: int
    auc: float
    q: float
    difference: float
    rate_positive: float
    rate_negative: float
    mean_positive: float
    mean_negative: float
    precision: float
    concept: str
    passages: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class LatentsPage:
    """`sets`: (name, rows) of the positive and the negative set. `facts`: (what, value) of SAE and model.

    tested: latents that fire often enough; significant: those of them with q ≤ 0.05, in the chosen direction.
    """

    title: str
    sets: tuple[tuple[str, int], tuple[str, int]]
    statistic: str
    tested: int
    significant: int
    latents: Sequence[SeparatingLatent]
    concepts: str
    facts: tuple[tuple[str, str], ...]


def build(page: LatentsPage) -> str:
    """The whole page. The same data gives the same text."""
    return rendered("latents.html.j2", {"page": page})
