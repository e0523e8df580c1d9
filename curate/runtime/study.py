"""The layer-stride study: each block's share in the influence scores of a sample of rows, by a crew of actors.

The sample is worked on in shards; an actor reads its shard, scores it by contraction, and writes one part table of
shares (id, row, and for every score column a list with one number a block). A run that is killed goes on at the shard
that is missing; below <store>/studies/<digest of the recipe>:

    recipe.json, shares/<shard>.parquet

What is told to the user (a page and its numbers) lies in the sink.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from connectors import storage
from curate.corpus.recipe import Recipe
from curate.corpus.render import Rendered
from curate.corpus.spread import Piece, count, cut, spread
from curate.corpus.units import Manifest
from curate.curvature import test_vector
from curate.evaluation.layer_stride import LayerStrides, layer_strides
from curate.reports.layer_stride import build
from curate.runtime.crew import Crew
from curate.runtime.differentiator import Differentiator
from curate.runtime.output import claim, read_parts
from curate.runtime.progress import Progress
from curate.runtime.reader import ReaderSpec, read_pieces
from curate.scoring.directional.base import Backend, Reduction
from curate.scoring.directional.make import make_backend

SHARD_ROWS = 64  # what a kill can cost, per actor


@dataclass(frozen=True)
class StudySpec:
    """`url`: the folder of the shares. `vectors`: by method, where the test vector lies and the rows' reduction.
    `rows`: of the sample, at most. `max_stride` None: as in `layer_strides`. `page`: where the results go, without
    suffix."""

    url: str
    reader: ReaderSpec
    vectors: Mapping[str, tuple[str, Reduction]]
    rows: int
    max_stride: int | None
    level: float
    page: str
    title: str


@dataclass(frozen=True)
class _Shard:
    url: str
    pieces: Sequence[Piece]
    spec: StudySpec


def study(spec: StudySpec, recipe: Recipe, manifest: Manifest, crew: Crew) -> LayerStrides:
    """Rank correlations by stride; also written as `<page>.html` and `<page>.json`.

    Raises:
        RecipeError: the folder holds the product of another recipe. CurvatureError: a test vector that does not fit
            the model. ConfigError: too few rows can be scored, or a stride larger than the number of tracked blocks.
    """
    claim(storage.join(spec.url, "recipe.json"), recipe, spec.url)
    folder = storage.join(spec.url, "shares")
    shards = cut(spread(manifest, spec.rows), SHARD_ROWS)
    jobs = [_Shard(storage.join(folder, f"{i:05d}.parquet"), shard, spec) for i, shard in enumerate(shards)]
    missing = [job for job in jobs if not storage.exists(job.url)]
    rows = sum(count(job.pieces) for job in jobs)
    progress = Progress("study", rows, rows - sum(count(job.pieces) for job in missing))
    for answer in crew.map(_shares, missing):
        progress.add(*answer)
    progress.close()
    table = pa.concat_tables(read_parts([job.url for job in jobs]))
    names = [name for name in table.column_names if name not in ("id", "row")]
    shares = np.stack([_matrix(table[name]) for name in names], axis=1)
    found = layer_strides(shares, names, spec.max_stride)
    storage.write_atomic(f"{spec.page}.json", json.dumps(_plain(found), indent=2) + "\n")
    storage.write_atomic(f"{spec.page}.html", build(found, spec.title, spec.level).encode())
    return found


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    flat = column.combine_chunks()
    return flat.values.to_numpy(zero_copy_only=False).reshape(len(flat), -1)


def _plain(found: LayerStrides) -> dict[str, object]:
    """JSON has no NaN: null."""
    body = asdict(found)
    for stride in body["strides"]:
        for key in ("correlation", "lowest", "highest"):
            stride[key] = [x if np.isfinite(x) else None for x in stride[key]]
    return body


def _shares(state: Differentiator, job: _Shard) -> tuple[int, int, int]:
    """Write one shard's table; returns rows, tokens and rows that cannot be used."""
    ids: list[str] = []
    numbers: list[int] = []
    rendered: list[Rendered] = []
    for chunk in read_pieces(job.pieces, job.spec.reader):
        rendered += chunk.rendered
        ids += [e.id for e in chunk.examples]
        numbers += [e.row for e in chunk.examples]
    columns: dict[str, pa.Array] = {"id": pa.array(ids, pa.string()), "row": pa.array(numbers, pa.int64())}
    for method, backend in state.kept(job.spec.url, lambda: _backends(state, job.spec)).items():
        shares = backend.run(rendered).by_block
        assert shares is not None
        for q, name in enumerate(backend.names):
            flat = pa.array(np.ascontiguousarray(shares[:, q]).ravel(), pa.float64())
            columns[f"{method}.{name}"] = pa.FixedSizeListArray.from_arrays(flat, backend.n_blocks)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    storage.write_atomic(job.url, sink.getvalue().to_pybytes())
    rows = count(job.pieces)
    return rows, sum(len(r.input_ids) for r in rendered), rows - len(rendered)


def _backends(state: Differentiator, spec: StudySpec) -> dict[str, Backend]:
    return {
        method: make_backend(
            "contraction",
            state.model,
            test_vector.load(url),
            state.spec.token_budget,
            state.pad_id,
            reduction,
            by_block=True,
        )
        for method, (url, reduction) in spec.vectors.items()
    }
