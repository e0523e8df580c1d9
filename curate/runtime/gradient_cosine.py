"""The pre-filter of a trace: how alike each row's loss gradient is to each test item's (paper B eq. 22), and who stays.

In: units, the finetuned model, the items' gradients as a test vector that was not solved (H = I). Out: parts with id,
row and `cosine`, a list with one number an item; from them a bound for each item, at or above which a row is its
candidate. Rows whose gradient is zero or not finite go to quarantine. Knows no latent influence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from curate.concepts import sae_files
from curate.concepts.sae import encode_flops
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import Part
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest
from curate.errors import ConfigError
from curate.models.load import ModelSpec, load_model, load_tokenizer, pad_id
from curate.models.peak import device_peak
from curate.models.splice import spliced
from curate.runtime.output import Output, read_part, read_parts
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.session import Session
from curate.runtime.stage import StageResult, committed, run_units
from curate.runtime.stream import fetch, put
from curate.runtime.test_vectors import from_store, load_arrays
from curate.scoring.directional.cosine import Cosine

ITEMS = "items"  # the one test vector of a trace, by the name under which actors fetch it
_TABLE = pa.schema([("id", pa.string()), ("row", pa.int64()), ("cosine", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class CosineSpec:
    """`sae`: URL of the SAE that is inserted. `gradients`: URL of the items' gradients. `token_budget`: padded tokens
    of a batch."""

    reader: ReaderSpec
    output: Output
    model: ModelSpec
    sae: str
    gradients: str
    token_budget: int


@dataclass(frozen=True)
class Bounds:
    """For each item: `least`, the cosine that a candidate has at least; how many rows have it (`kept`, of `rows`); and
    the `largest` cosine of all."""

    least: NDArray[np.float32]
    kept: NDArray[np.int64]
    largest: NDArray[np.float32]
    rows: int


class CosineWorker:
    """One actor: the model with its SAE, a chunk in, a committed part out."""

    def __init__(self, spec: CosineSpec, gradients: Any, threads: int, peak_tflops: float | None) -> None:
        torch.set_num_threads(max(1, threads))
        self.spec = spec
        self.model = load_model(spec.model)
        self.peak = device_peak(self.model.device, self.model.dtype, peak_tflops)
        self.sae = sae_files.load(spec.sae).to(self.model.device)
        pad = pad_id(load_tokenizer(spec.model))
        self.cosine = Cosine(self.model, from_store(fetch(gradients))[ITEMS], spec.token_budget, pad)

    def __call__(self, item: bytes) -> bytes:
        began = time.perf_counter()
        chunk = Chunk.from_bytes(item)
        with spliced(self.model, self.sae):
            found = self.cosine.run(chunk.rendered)
        good = np.isfinite(found.scores).all(axis=1)
        bad = list(chunk.bad)
        for i in np.flatnonzero(~good):
            e = chunk.examples[i]
            bad.append(Quarantined(e.row, "its loss gradient is zero or not finite", e.id, e.response[:200]))
        kept = np.flatnonzero(good)
        table = pa.table(
            {
                "id": [chunk.examples[i].id for i in kept],
                "row": [chunk.examples[i].row for i in kept],
                "cosine": [found.scores[i].astype(np.float32) for i in kept],
            },
            schema=_TABLE,
        )
        self.spec.output.commit(Part(chunk.key, chunk.start, chunk.stop), table, bad)
        tokens = sum(r.end for r in chunk.rendered)
        flops = found.stats.flops + encode_flops(self.sae, tokens)
        return committed(chunk, bad, tokens, began, flops, self.peak)


def gradient_cosines(
    spec: CosineSpec, recipe: Recipe, manifest: Manifest, session: Session, max_bad_fraction: float
) -> StageResult:
    """The cosines of every row of `manifest` that has no part yet.

    Raises:
        RecipeError: the output holds cosines of another recipe.
        CorpusError: more than `max_bad_fraction` of the rows are bad; parts and quarantine stay for inspection.
    """
    ref = put(load_arrays({ITEMS: spec.gradients}))  # kept here while actors may be replaced
    make = partial(CosineWorker, spec, ref, max(1, round(session.scorers.cpus)), session.peak_tflops)
    read = partial(read_chunks, spec=spec.reader)
    return run_units(
        "trace: pre-filter",
        spec.output,
        recipe,
        manifest,
        make,
        session.scorers,
        read,
        session.readers,
        max_bad_fraction,
    )


def tables(output: Output, manifest: Manifest, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """(key of the file, table) of the parts of `manifest`, in order, without rows that lie beyond it."""
    stops: dict[str, int] = {}
    for unit in manifest.units:
        stops[unit.key] = max(unit.stop, stops.get(unit.key, 0))
    parts = [(p, url) for p, url in sorted(output.check_whole(manifest).items()) if p.start < stops.get(p.key, 0)]
    read = read_parts([url for _, url in parts], columns, threads=2)  # few: parts with tokens are large
    for (part, _), table in zip(parts, read, strict=True):
        if part.stop > stops[part.key]:  # of an earlier run over more rows
            table = table.filter(pa.compute.less(table["row"], stops[part.key]))
        yield part.key, table


def cosines_of(table: pa.Table, items: int) -> Float[np.ndarray, "rows items"]:
    """The column `cosine` as a matrix."""
    flat = table["cosine"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, items)


def bounds(
    output: Output, manifest: Manifest, names: Sequence[str], keep: float, min_cosine: float | None = None
) -> Bounds:
    """Who stays: for each item of `names` the share `keep` of the rows that have the largest cosines, and of these the
    ones of at least `min_cosine`. Rows that share the last place all stay. Holds `keep`·rows numbers an item.

    Raises:
        ConfigError: no row stays for any item; names the largest cosine that there is.
    """
    q = len(names)
    most = max(1, math.ceil(keep * manifest.rows))
    top = np.empty((0, q), np.float32)
    rows = 0
    for _, table in tables(output, manifest, ["row", "cosine"]):
        found = cosines_of(table, q)
        rows += len(found)
        top = np.concatenate([top, found])
        if len(top) > 2 * most:
            top = _largest(top, most)
    top = _largest(top, most)
    least = top.min(axis=0) if len(top) else np.full(q, np.inf, np.float32)
    largest = top.max(axis=0) if len(top) else np.full(q, -np.inf, np.float32)
    if min_cosine is not None:
        least = np.maximum(least, np.float32(min_cosine))
    kept = np.zeros(q, np.int64)
    for _, table in tables(output, manifest, ["row", "cosine"]):
        kept += (cosines_of(table, q) >= least).sum(axis=0)
    if not kept.any():
        where = (
            "" if not rows else f" The largest cosine is {largest.max():.3g} (item {names[int(largest.argmax())]!r})"
        )
        why = f", below trace.min_cosine={min_cosine}; lower it" if rows else " No row has a gradient; see quarantine"
        raise ConfigError(
            f"the pre-filter keeps none of the {rows:,} rows for any of the {q} items.{where}{why}, or give another "
            f"corpus."
        )
    return Bounds(least, kept, largest, rows)


def _largest(values: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """The `n` largest of each column, in any order."""
    return values if len(values) <= n else np.partition(values, len(values) - n, axis=0)[len(values) - n :]


def read_cosines(output: Output, key: str, start: int, stop: int, items: int) -> dict[int, NDArray[np.float32]]:
    """{row: its cosines} of the rows [start, stop) of a file."""
    out: dict[int, NDArray[np.float32]] = {}
    for part, url in sorted(output.parts(key).items()):
        if part.start < stop and part.stop > start:
            table = read_part(url, ["row", "cosine"])
            pairs = zip(table["row"].to_pylist(), cosines_of(table, items), strict=True)
            out.update((row, values) for row, values in pairs if start <= row < stop)
    return out
