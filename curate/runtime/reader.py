"""Readers: Ray tasks that turn units into chunks of tokenised rows. A bad row becomes a quarantined one, here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from connectors import registry
from connectors.base import Row
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import unit_name
from curate.corpus.example import ColumnMap, Example, to_example
from curate.corpus.render import Rendered, Renderer
from curate.corpus.units import Unit
from curate.errors import BadRow
from curate.models.load import ModelSpec, load_tokenizer
from curate.runtime.events import about
from curate.runtime.output import Output, read_part
from curate.runtime.stage import work_items

EXCERPT = 200


@dataclass(frozen=True)
class ReaderSpec:
    """How rows become tokens.

    `generations` is the output place of the base model's own responses, where the scorer wants them. With
    `prompts_only` the tokens are those that a model is given to answer, and the response is not read at all.
    """

    format: str
    columns: ColumnMap
    model: ModelSpec
    max_tokens: int
    overlong: str
    generations: str | None = None
    prompts_only: bool = False


@lru_cache(maxsize=4)
def _renderer(model: ModelSpec, max_tokens: int, overlong: str) -> Renderer:
    return Renderer(load_tokenizer(model), max_tokens, overlong)  # type: ignore[arg-type]


def own_responses(url: str, key: str, start: int, stop: int) -> dict[int, str]:
    """The base model's responses to rows [start, stop) of a file, by row."""
    out = {}
    for part, where in sorted(Output(url).parts(key).items()):
        if part.start < stop and part.stop > start:
            table = read_part(where, ["row", "response"])
            rows, texts = table["row"].to_pylist(), table["response"].to_pylist()
            out.update({r: t for r, t in zip(rows, texts, strict=True) if start <= r < stop})
    return out


def _prompt(renderer: Renderer, example: Example) -> Rendered:
    ids = renderer.prompt_ids(example)
    return Rendered(ids, len(ids), len(ids), len(ids))


def _excerpt(row: Row) -> str:
    text = row.error if row.value is None else json.dumps(row.value, ensure_ascii=False, default=str)
    return (text or "")[:EXCERPT]


def read_chunks(item: bytes, spec: ReaderSpec) -> Iterator[bytes]:
    """Chunks of one unit, one a part range, in order."""
    job = json.loads(item)
    unit = Unit(**job["unit"])
    connector = registry.connectors()[spec.format]
    renderer = _renderer(spec.model, spec.max_tokens, spec.overlong)
    ranges = [(a, b) for a, b in job["ranges"]]
    with about(unit_name(unit.key, unit.start, unit.stop)):
        yield from _chunks(unit, connector.read(unit, spec.columns.used(), ranges), spec, renderer)


def _chunks(
    unit: Unit, found: Iterable[tuple[int, int, Iterable[Row]]], spec: ReaderSpec, renderer: Renderer
) -> Iterator[bytes]:
    for start, stop, rows in found:
        own = own_responses(spec.generations, unit.key, start, stop) if spec.generations else {}
        examples, rendered, responses, bad = [], [], [], []
        for row in rows:
            name = None
            try:
                if row.value is None:
                    raise BadRow(row.error or "unreadable row")
                example = to_example(row.value, row.index, spec.columns)
                name = example.id
                tokens = _prompt(renderer, example) if spec.prompts_only else renderer.render(example)
            except BadRow as e:
                bad.append(Quarantined(row.index, e.reason, name, _excerpt(row)))
                continue
            text = own.get(row.index)
            reply = (text, renderer.render_pair(example, text)) if text is not None and text.strip() else None
            examples.append(example)
            rendered.append(tokens)
            responses.append(reply)
        yield Chunk(unit.key, start, stop, examples, rendered, responses, bad).to_bytes()


def read_pieces(pieces: Sequence[tuple[Unit, list[tuple[int, int]]]], spec: ReaderSpec) -> Iterator[Chunk]:
    """The chunks of some ranges of units, for who reads in its own process and not through a stream."""
    for item in work_items(pieces):
        yield from map(Chunk.from_bytes, read_chunks(item, spec))
