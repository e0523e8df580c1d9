"""The tokens stage: every row of a corpus as token ids, once; all trainings of the corpus read them from there.

In: a manifest and how rows become tokens. Out: parts below <store>/tokens/<digest of the recipe>/, a table each with
id, row (in its file), input_ids, start, end (the tokens that carry the loss). A run over more rows adds parts. Knows no
model and no training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from connectors import storage
from curate.corpus.chunk import Chunk
from curate.corpus.coverage import Part
from curate.corpus.recipe import Recipe
from curate.corpus.render import tokenizer_digest
from curate.corpus.units import Manifest
from curate.models.load import load_tokenizer
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.select import file_spans
from curate.runtime.session import Pool, Session
from curate.runtime.stage import StageResult, committed, run_units
from curate.training.rows import TOKENS, TokenPart

_WRITER_CPUS = 0.25  # a writer waits for the store most of the time


@dataclass(frozen=True)
class TokenRows:
    """The tokenised rows of a run: where they lie, the digest of what they are made from, and how many rows the run
    has, bad ones included: the length of a mask over them (global rows, as in `runtime.select.Scores`)."""

    parts: tuple[TokenPart, ...]
    digest: str
    rows: int


def token_recipe(corpus: dict[str, Any], reader: ReaderSpec) -> Recipe:
    """What the tokens of a corpus are made from."""
    fields = {
        "corpus": corpus,
        "tokenizer": tokenizer_digest(load_tokenizer(reader.model)),
        "max_tokens": reader.max_tokens,
        "overlong": reader.overlong,
    }
    return Recipe("tokens", fields)


def _write(item: bytes, output: Output) -> bytes:
    began = time.perf_counter()
    chunk = Chunk.from_bytes(item)
    table = pa.table(
        {
            "id": pa.array([e.id for e in chunk.examples], pa.string()),
            "row": pa.array([e.row for e in chunk.examples], pa.int64()),
            "input_ids": pa.array([r.input_ids for r in chunk.rendered], TOKENS),
            "start": pa.array([r.start for r in chunk.rendered], pa.int32()),
            "end": pa.array([r.end for r in chunk.rendered], pa.int32()),
        }
    )
    output.commit(Part(chunk.key, chunk.start, chunk.stop), table, chunk.bad)
    return committed(chunk, chunk.bad, sum(len(r.input_ids) for r in chunk.rendered), began)


def _writer(output: Output) -> Callable[[bytes], bytes]:
    return partial(_write, output=output)


def make_tokens(
    store: str,
    corpus: dict[str, Any],
    reader: ReaderSpec,
    manifest: Manifest,
    session: Session,
    max_bad_fraction: float,
) -> tuple[TokenRows, StageResult]:
    """Tokenise what is not yet. `corpus` is what the corpus is, for the recipe.

    Raises:
        CorpusError: more than `max_bad_fraction` of the rows are bad; parts and quarantine stay for inspection.
    """
    reader = replace(reader, generations=None, prompts_only=False)
    recipe = token_recipe(corpus, reader)
    output = Output(storage.join(store, "tokens", recipe.digest))
    pool = Pool(session.readers.size, _WRITER_CPUS, 0.0)
    read = partial(read_chunks, spec=reader)
    result = run_units(
        "tokens", output, recipe, manifest, partial(_writer, output), pool, read, session.readers, max_bad_fraction
    )
    return token_rows(output, recipe, manifest), result


def token_rows(output: Output, recipe: Recipe, manifest: Manifest) -> TokenRows:
    """The parts of `manifest`'s rows in order, after the check that none is missing."""
    spans = file_spans(manifest)
    parts = []
    for part, url in sorted(output.check_whole(manifest).items()):
        if part.key in spans and part.start < spans[part.key][1] - spans[part.key][0]:
            parts.append(TokenPart(url, *spans[part.key]))
    return TokenRows(
        tuple(sorted(parts, key=lambda p: (p.first, p.url))),
        recipe.digest,
        max((stop for _, stop in spans.values()), default=0),
    )
