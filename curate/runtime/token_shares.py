"""What each token of a few shown responses adds to an influence score, for the colours of a report.

In: the shown conversations and a test vector. Out: the same with their tokens. One more forward pass over these rows,
with tangents: a token's share is what training on its own loss would add; with the end of turn they sum to the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from curate.corpus.example import Example, Message
from curate.corpus.render import Rendered, Renderer
from curate.curvature import test_vector
from curate.errors import BadRow
from curate.models.load import load_tokenizer
from curate.models.pieces import token_pieces
from curate.reports.data import ExampleSets, ExampleView
from curate.runtime.crew import Crew
from curate.runtime.differentiator import Differentiator
from curate.runtime.reader import ReaderSpec
from curate.scoring.directional.base import Reduction
from curate.scoring.directional.forward import Forward

MEANING = "what training on the token alone adds to the score"
_AT_ONCE = 8  # conversations of one item
Tokens = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TokenSpec:
    """The column `name` of the test vector at `url`; rows are rendered as `reader` does."""

    url: str
    name: str
    reduction: Reduction
    reader: ReaderSpec


def with_tokens(sets: ExampleSets, spec: TokenSpec, crew: Crew) -> ExampleSets:
    """`sets` with the tokens of every scored response; a view that cannot be rendered again stays as it is."""
    views = list({v.id: v for v in (*sets.highest, *sets.lowest, *sets.borderline)}.values())
    items = [(spec, views[i : i + _AT_ONCE]) for i in range(0, len(views), _AT_ONCE)]
    found: dict[str, Tokens] = {}
    for answer in crew.map(_shares, items):
        found.update(answer)

    def coloured(shown: Sequence[ExampleView]) -> tuple[ExampleView, ...]:
        return tuple(replace(v, tokens=found.get(v.id)) for v in shown)

    return ExampleSets(coloured(sets.highest), coloured(sets.lowest), coloured(sets.borderline))


def _shares(state: Differentiator, item: tuple[TokenSpec, Sequence[ExampleView]]) -> dict[str, Tokens]:
    spec, views = item
    tokenizer = load_tokenizer(spec.reader.model)
    renderer = Renderer(tokenizer, spec.reader.max_tokens, spec.reader.overlong)  # type: ignore[arg-type]
    rows: list[tuple[str, Rendered]] = []
    for view in views:
        messages = tuple(Message(role, text) for role, text in view.messages)
        try:
            rows.append((view.id, renderer.render(Example(view.id, view.row, messages))))
        except BadRow:
            continue
    backend = state.kept(spec.url, lambda: _backend(state, spec))
    tokens = backend.run([r for _, r in rows]).tokens
    assert tokens is not None
    column = backend.names.index(spec.name)
    out: dict[str, Tokens] = {}
    for (name, row), values in zip(rows, tokens, strict=True):
        pieces = token_pieces(tokenizer, row.input_ids[row.start : row.stop])
        out[name] = tuple(zip(pieces, values[row.start : row.stop, column].tolist(), strict=True))
    return out


def _backend(state: Differentiator, spec: TokenSpec) -> Forward:
    vector, budget = test_vector.load(spec.url), state.spec.token_budget
    return Forward(state.model, vector, budget, state.pad_id, spec.reduction, per_token=True)
