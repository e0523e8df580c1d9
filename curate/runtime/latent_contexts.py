"""Where a latent fires: the words around the token of its highest activation, in the rows on which it is strongest.

In: latent activations of a corpus and the latents to show. Out: Passages, for pages and files. Reads the few rows that
are shown from the source again; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from curate.concepts.latent_rows import strongest
from curate.corpus.units import Manifest, Unit
from curate.models.load import load_tokenizer
from curate.models.pieces import token_pieces
from curate.reports.passages import Passage
from curate.runtime.latent_activations import LatentTable
from curate.runtime.reader import ReaderSpec, read_pieces

Peaks = dict[tuple[int, int], int]


def latent_contexts(
    table: LatentTable,
    latents: Sequence[int],
    n: int,
    around: int,
    manifest: Manifest,
    reader: ReaderSpec,
    set_: Literal["", "positive", "negative"] = "",
) -> list[list[Passage]]:
    """For each of `latents`, passages from the `n` rows on which it is strongest, strongest first.

    `around` tokens stand before and after the one of the highest activation. `set_`: said of every passage.
    """
    if n < 1 or not latents:
        return [[] for _ in latents]
    found = strongest(table.blocks, np.asarray(latents), n, table.latents)
    wanted = {(row, latent) for latent, rows in zip(latents, found, strict=True) for row, _ in rows}
    peaks = _peaks(table, wanted)
    keys = sorted(table.spans.items(), key=lambda kv: kv[1])
    tokenizer = load_tokenizer(reader.model)
    rows = {row for row, _ in wanted}
    here: dict[int, tuple[str, str, int, str | None, list[int]]] = {}
    for key, (a, b) in keys:
        mine = sorted(row - a for row in rows if a <= row < b)
        for chunk in read_pieces(_pieces(manifest, key, mine), reader):
            for e, r in zip(chunk.examples, chunk.rendered, strict=True):
                here[a + e.row] = (e.id, key, e.row, e.label, list(r.input_ids))
    out: list[list[Passage]] = []
    for latent, strong in zip(latents, found, strict=True):
        out.append([])
        for row, activation in strong:
            if row not in here:
                continue
            name, key, number, label, ids = here[row]
            at = peaks[row, latent]
            low, high = max(0, at - around), min(len(ids), at + around + 1)
            pieces = token_pieces(tokenizer, ids[low:high])
            k = at - low
            before, token, after = "".join(pieces[:k]), pieces[k], "".join(pieces[k + 1 :])
            out[-1].append(Passage(before, token, after, activation, name, key, number, label, set_))
    return out


def _peaks(table: LatentTable, wanted: set[tuple[int, int]]) -> Peaks:
    rows = np.array(sorted({row for row, _ in wanted}))
    out: Peaks = {}
    for numbers, part in table.tables(["latents", "peak"]):
        for k in np.flatnonzero(np.isin(numbers, rows)):
            row = int(numbers[k])
            for latent, at in zip(part["latents"][int(k)].as_py(), part["peak"][int(k)].as_py(), strict=True):
                if (row, latent) in wanted:
                    out[row, latent] = at
    return out


def _pieces(manifest: Manifest, key: str, rows: Sequence[int]) -> list[tuple[Unit, list[tuple[int, int]]]]:
    """Single rows of one file as ranges of its units."""
    out = []
    for unit in manifest.units:
        mine = [(r, r + 1) for r in rows if unit.key == key and unit.start <= r < unit.stop]
        if mine:
            out.append((unit, mine))
    return out
