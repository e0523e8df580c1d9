"""What a trace shows, from what its stages left: test items with their rows, tokens and latents.

In: totals of latent influence, items with their own latents. Out: the views of the page. Reads the shown rows again;
knows no settings, no model, and computes no influence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from curate.corpus.example import Example
from curate.corpus.render import Rendered
from curate.corpus.units import Manifest
from curate.curvature.queries import Query
from curate.models.pieces import token_pieces
from curate.reports.trace_data import Context, Firing, InfluentialRow, LatentView, TokenText, TracedItem
from curate.runtime.item_latents import ItemLatents
from curate.runtime.latent_totals import Pair, Place, Totals, contexts, firings
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec, read_pieces

FIRINGS = 6  # of a token, on the page
AROUND = 12  # tokens on either side of a context's


def read_rows(manifest: Manifest, places: set[Place], reader: ReaderSpec) -> dict[Place, tuple[Example, Rendered]]:
    """The rows at `places`, read again; one that has become unreadable is left out."""
    wanted: dict[str, list[int]] = {}
    for key, row in sorted(places):
        wanted.setdefault(key, []).append(row)
    pieces = []
    for unit in manifest.units:
        mine = [(r, r + 1) for r in wanted.get(unit.key, []) if unit.start <= r < unit.stop]
        if mine:
            pieces.append((unit, mine))
    out = {}
    for chunk in read_pieces(pieces, reader):
        for example, rendered in zip(chunk.examples, chunk.rendered, strict=True):
            out[chunk.key, example.row] = (example, rendered)
    return out


class View:
    """The views of a page, made of totals and of what was read and looked at again."""

    def __init__(
        self,
        totals: Totals,
        output: Output,
        manifest: Manifest,
        reader: ReaderSpec,
        tokenizer: PreTrainedTokenizerBase,
        shown: int,
        n_contexts: int,
    ) -> None:
        """`shown`: latents that are named of an item."""
        self.totals, self.tokenizer, self.shown = totals, tokenizer, shown
        self.named = [_strongest(row, shown) for row in totals.importance]
        chosen = sorted({latent for named in self.named for latent, _ in named})
        self.contexts = contexts(output, manifest, chosen, n_contexts) if n_contexts else {}
        around = {f.place for found in self.contexts.values() for f in found}
        pairs = [p for found in (*totals.best, *totals.worst) for p in found]
        self.fires = firings(output, manifest, around) if around else {}
        self.rows = read_rows(manifest, around | {p.place for p in pairs}, reader)

    def item(self, number: int, query: Query, question: str, seen: ItemLatents) -> TracedItem:
        """The `number`-th test item. `question`: its text in a few words."""
        row, importance = query.positive, self.totals.importance[number]
        pieces = token_pieces(self.tokenizer, row.input_ids)
        firing: list[tuple[Firing, ...]] = []
        for indices, values in zip(seen.indices, seen.activations, strict=True):
            weight = np.abs(values * importance[indices])
            order = [i for i in np.argsort(-weight, kind="stable")[:FIRINGS] if values[i] > 0]
            firing.append(tuple(Firing(int(indices[i]), float(values[i])) for i in order))
        firing += [()] * (len(pieces) - len(firing))
        return TracedItem(
            query.id,
            TokenText(tuple(pieces), tuple(firing), row.start, row.stop),
            _named(_strongest(importance, len(importance)), self.shown, firing),
            self._rows(self.totals.best[number]),
            self._rows(self.totals.worst[number]),
            question,
            right="".join(pieces[row.start : row.stop]).strip(),
            candidates=int(self.totals.pairs[number]),
        )

    def _rows(self, pairs: Sequence[Pair]) -> tuple[InfluentialRow, ...]:
        return tuple(self._row(p) for p in pairs if p.place in self.rows)

    def _row(self, pair: Pair) -> InfluentialRow:
        _, rendered = self.rows[pair.place]
        pieces = token_pieces(self.tokenizer, rendered.input_ids)
        tokens: list[list[Firing]] = [[] for _ in pieces]
        for position, latent, influence, activation in zip(*(part.tolist() for part in pair.tokens), strict=True):
            tokens[position].append(Firing(latent, activation, influence))
        firing = tuple(tuple(sorted(of, key=_weight, reverse=True)[:FIRINGS]) for of in tokens)
        text = TokenText(tuple(pieces), firing, rendered.start, rendered.stop)
        source, row = pair.place
        cosine = None if pair.cosine is None else float(pair.cosine)
        latents = _named(pair.latents, self.shown, firing)
        return InfluentialRow(pair.id, pair.score, latents, text, row, source, pair.label, pair.group, cosine)

    def latents(self) -> tuple[LatentView, ...]:
        """The latents that some item names, those of the largest mean influence first."""
        times: dict[int, int] = {}
        for named in self.named:
            for latent, _ in named:
                times[latent] = times.get(latent, 0) + 1
        mean = self.totals.importance.mean(axis=0)
        return tuple(
            LatentView(
                latent,
                float(mean[latent]),
                times[latent],
                float(self.totals.frequency[latent]),
                tuple(
                    self._context(latent, f.place, f.position, f.id)
                    for f in self.contexts.get(latent, ())
                    if f.place in self.rows
                ),
            )
            for latent in sorted(times, key=lambda k: (-abs(mean[k]), k))
        )

    def _context(self, latent: int, place: Place, position: int, name: str) -> Context:
        pieces = token_pieces(self.tokenizer, self.rows[place][1].input_ids)
        at = range(max(0, position - AROUND), min(len(pieces), position + AROUND + 1))
        fires = self.fires[place]
        return Context(tuple((pieces[t], float(fires.get((t, latent), 0.0))) for t in at), name)


def _named(
    latents: Sequence[tuple[int, float]], shown: int, firing: Sequence[Sequence[Firing]]
) -> tuple[tuple[int, float], ...]:
    """The first `shown` latents, and those further on that some token names."""
    fires = {f.latent for of in firing for f in of}
    return tuple(x for i, x in enumerate(latents) if i < shown or x[0] in fires)


def _weight(f: Firing) -> float:
    return abs(f.activation * (f.influence or 0.0))


def _strongest(importance: Float[np.ndarray, " h"], n: int) -> tuple[tuple[int, float], ...]:
    """The latents of the largest |importance|, largest first; none whose importance is zero."""
    order = np.argsort(-np.abs(importance), kind="stable")[:n]
    return tuple((int(k), float(importance[k])) for k in order if importance[k] != 0)
