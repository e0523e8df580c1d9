"""The latent-influence stage: candidate rows in, parts out with what each latent of each row does to each test item.

In: units, the finetuned model, an SAE, the items' test vectors, and for each item the cosine that a candidate has at
least. Out: parts with one table row a pair of row and item (columns: `COLUMNS`). A row that is no item's candidate is
read and left out; one whose latents or influence are not finite goes to quarantine. Knows no ranking.

Influence is as `curate.scoring.latent` gives it: per token and latent, zero where a latent does not fire.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from curate.concepts import sae_files
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import Part
from curate.corpus.example import Example
from curate.corpus.recipe import Recipe
from curate.corpus.render import Rendered
from curate.corpus.units import Manifest
from curate.curvature.fisher import Reduction
from curate.errors import BadRow
from curate.models.load import ModelSpec, load_model, load_tokenizer, pad_id
from curate.models.peak import device_peak
from curate.runtime.gradient_cosine import ITEMS, read_cosines
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.session import Session
from curate.runtime.stage import StageResult, committed, run_units
from curate.runtime.stream import fetch, put
from curate.runtime.test_vectors import from_store, load_arrays
from curate.scoring.latent.base import RowLatents
from curate.scoring.latent.make import make_latent_backend

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("item", pa.string()),
        ("cosine", pa.float32()),  # null without a pre-filter
        ("score", pa.float64()),  # Σ of all influence
        # of each latent that fires in the row, ascending: Σ over tokens of influence and activation; tokens it fires on
        ("latents", pa.list_(pa.int32())),
        ("influence", pa.list_(pa.float32())),
        ("latent_activation", pa.list_(pa.float32())),
        ("latent_tokens", pa.list_(pa.int32())),
        # of each token, in order, its latents of the largest |activation × influence|
        ("token_position", pa.list_(pa.int32())),
        ("token_latent", pa.list_(pa.int32())),
        ("token_influence", pa.list_(pa.float32())),
        ("token_activation", pa.list_(pa.float32())),
    ]
)
"""Columns of a part, one row a pair of row and item."""


@dataclass(frozen=True)
class LatentSpec:
    """`sae`: URL. `vector`: URL of the test vectors of `items`. `backend`: see `make_latent_backend`; `reduction` of a
    row's loss. `token_budget`: padded tokens of a batch. `token_latents`: of each token so many are kept, None: all.
    `cosines`: where the pre-filter's parts lie, `least`: what a candidate has for each item; None: every row is one."""

    reader: ReaderSpec
    output: Output
    model: ModelSpec
    sae: str
    vector: str
    items: tuple[str, ...]
    backend: str
    reduction: Reduction
    token_budget: int
    token_latents: int | None = None
    cosines: Output | None = None
    least: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Candidates:
    """The rows of one range that are a candidate of some item: of row i the `items[i]` with its `cosines[i]`."""

    chunk: Chunk
    items: list[list[int]]
    cosines: list[list[float | None]]

    def to_bytes(self) -> bytes:
        head = json.dumps([self.items, self.cosines]).encode()
        return len(head).to_bytes(8, "big") + head + self.chunk.to_bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Candidates:
        stop = 8 + int.from_bytes(data[:8], "big")
        return Candidates(Chunk.from_bytes(data[stop:]), *json.loads(data[8:stop]))


def read_candidates(item: bytes, spec: LatentSpec) -> Iterator[bytes]:
    """Of each part range of one unit the candidate rows, in order."""
    for data in read_chunks(item, spec.reader):
        chunk = Chunk.from_bytes(data)
        yield _candidates(chunk, spec).to_bytes()


def _candidates(chunk: Chunk, spec: LatentSpec) -> Candidates:
    every = list(range(len(spec.items)))
    if spec.cosines is None or spec.least is None:
        rows = len(chunk.examples)
        return Candidates(chunk, [every] * rows, [[None] * len(every)] * rows)
    found = read_cosines(spec.cosines, chunk.key, chunk.start, chunk.stop, len(every))
    least = np.array(spec.least, np.float32)
    out = Candidates(Chunk(chunk.key, chunk.start, chunk.stop, [], [], [], chunk.bad), [], [])
    for example, rendered in zip(chunk.examples, chunk.rendered, strict=True):
        values = found.get(example.row)
        mine = [] if values is None else np.flatnonzero(values >= least).tolist()
        if values is not None and mine:
            out.chunk.examples.append(example)
            out.chunk.rendered.append(rendered)
            out.chunk.own.append(None)
            out.items.append(mine)
            out.cosines.append([float(values[q]) for q in mine])
    return out


class LatentWorker:
    """One actor: model, SAE and test vectors on its device; candidates in, a committed part out."""

    def __init__(self, spec: LatentSpec, vectors: Any, threads: int, peak_tflops: float | None) -> None:
        torch.set_num_threads(max(1, threads))
        self.spec = spec
        model = load_model(spec.model)
        self.peak = device_peak(model.device, model.dtype, peak_tflops)
        sae = sae_files.load(spec.sae).to(model.device)
        pad = pad_id(load_tokenizer(spec.model))
        vector = from_store(fetch(vectors))[ITEMS]
        self.backend = make_latent_backend(spec.backend, model, sae, vector, spec.token_budget, pad, spec.reduction)

    def __call__(self, item: bytes) -> bytes:
        began = time.perf_counter()
        given = Candidates.from_bytes(item)
        chunk, before = given.chunk, self.backend.stats.flops
        found = self._run(chunk.rendered, given.items)
        bad = list(chunk.bad)
        pairs: list[dict[str, Any]] = []
        for i, (example, row) in enumerate(zip(chunk.examples, found, strict=True)):
            if isinstance(row, BadRow):
                bad.append(Quarantined(example.row, row.reason, example.id, example.response[:200]))
            else:
                facts = row_facts(example, chunk.rendered[i])
                for at, (q, cosine) in enumerate(zip(given.items[i], given.cosines[i], strict=True)):
                    told = {"item": self.spec.items[q], "cosine": cosine}
                    pairs.append({**facts, **told, **pair(row, at, self.spec.token_latents)})
        table = pa.Table.from_pylist(pairs, schema=COLUMNS)
        self.spec.output.commit(Part(chunk.key, chunk.start, chunk.stop), table, bad)
        tokens = sum(r.end for r in chunk.rendered)
        return committed(chunk, bad, tokens, began, self.backend.stats.flops - before, self.peak, pairs=len(pairs))

    def _run(self, rows: Sequence[Rendered], items: Sequence[Sequence[int]]) -> list[RowLatents | BadRow]:
        """The rows' influence on their own items. Rows of the same items go together: a pass costs 2 forwards and 2
        more an item."""
        together: dict[tuple[int, ...], list[int]] = {}
        for i, mine in enumerate(items):
            together.setdefault(tuple(mine), []).append(i)
        out: dict[int, RowLatents | BadRow] = {}
        for mine, at in together.items():
            out.update(zip(at, self.backend.run([rows[i] for i in at], list(mine)), strict=True))
        return [out[i] for i in range(len(rows))]


def row_facts(example: Example, rendered: Rendered) -> dict[str, Any]:
    """The columns of a pair that are of its row alone."""
    return {
        "id": example.id,
        "row": example.row,
        "label": example.label,
        "group": example.group,
        "prompt_tokens": rendered.start,
        "response_tokens": rendered.stop - rendered.start,
    }


def pair(row: RowLatents, at: int, token_latents: int | None) -> dict[str, Any]:
    """The columns of a pair that are its influence: of the `at`-th item of `row`. Latents that do not fire are left
    out."""
    influence: NDArray[np.floating] = row.influence[at]
    fires = row.activations > 0
    latents, inverse = np.unique(row.indices[fires], return_inverse=True)
    n = len(latents)
    strongest = fires
    if token_latents is not None and token_latents < row.indices.shape[1]:
        # What does not fire last; a stable order, so that ties do not depend on the machine.
        weight = np.where(fires, np.abs(row.activations * influence), -1.0)
        order = np.argsort(-weight, axis=1, kind="stable")[:, :token_latents]
        strongest = np.zeros_like(fires)
        np.put_along_axis(strongest, order, True, axis=1)
        strongest &= fires
    position, _ = np.nonzero(strongest)
    return {
        "score": float(influence.sum(dtype=np.float64)),
        "latents": latents.astype(np.int32),
        "influence": np.bincount(inverse, influence[fires], n).astype(np.float32),
        "latent_activation": np.bincount(inverse, row.activations[fires], n).astype(np.float32),
        "latent_tokens": np.bincount(inverse, minlength=n).astype(np.int32),
        "token_position": position.astype(np.int32),
        "token_latent": row.indices[strongest].astype(np.int32),
        "token_influence": influence[strongest].astype(np.float32),
        "token_activation": row.activations[strongest].astype(np.float32),
    }


def latent_influence(
    spec: LatentSpec, recipe: Recipe, manifest: Manifest, session: Session, max_bad_fraction: float
) -> StageResult:
    """The influence of the candidates among the rows of `manifest` that has no part yet.

    Raises:
        RecipeError: the output holds the influence of another recipe.
        CurvatureError: the test vector has layers below the SAE, or is of another model. ConceptError: the SAE does not
            fit the model.
        CorpusError: more than `max_bad_fraction` of the rows are bad; parts and quarantine stay for inspection.
    """
    ref = put(load_arrays({ITEMS: spec.vector}))  # kept here while actors may be replaced
    make = partial(LatentWorker, spec, ref, max(1, round(session.scorers.cpus)), session.peak_tflops)
    read = partial(read_candidates, spec=spec)
    return run_units(
        "trace: latents", spec.output, recipe, manifest, make, session.scorers, read, session.readers, max_bad_fraction
    )
