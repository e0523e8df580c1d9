"""Passages: where a latent fires, as a page and a file show it. Plain values; knows no model and no files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """Text around the token on which a latent is strongest in one row. `activation`: the row's, by which it was chosen.

    `source`, `row`: file and row in it. `set`: which of two sets of rows it is from ("" where there is one).
    """

    before: str
    token: str
    after: str
    activation: float
    id: str
    source: str
    row: int
    label: str | None = None
    set: str = ""
