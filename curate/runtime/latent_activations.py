"""The latents stage: how strongly each SAE latent fires on every row of a corpus, sparse, by the scoring pool.

In: a manifest, how rows become tokens, an SAE of the model that reads them. Out: parts below
<store>/latents/<digest of the recipe>/, one table row an example:

    id, row, label, group, prompt_tokens, response_tokens
    latents  list<int32>    the latents that fire on it, rising
    mean     list<float32>  their mean activation over its tokens, those on which they do not fire counting 0
    max      list<float32>  their maximum
    peak     list<int32>    the token of the maximum, counted from the start of the conversation; ties: the first

Tokens are those of the response, or with `tokens="all"` the prompt's as well. The forward pass stops at the SAE's
layer, and latents that do not fire are never written. A row whose states are not finite goes to quarantine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from curate.concepts.latent_rows import LatentRows, Statistic, Tokens, latent_rows
from curate.concepts.sae import SAE, digest, encode, encode_flops
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import Part
from curate.corpus.recipe import Recipe
from curate.corpus.render import Rendered, tokenizer_digest
from curate.corpus.units import Manifest
from curate.models.batching import collate, token_batches
from curate.models.flops import model_cost
from curate.models.load import load_model, load_tokenizer
from curate.models.peak import device_peak
from curate.models.tap import LayerTap
from curate.runtime.output import Output, read_parts
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.select import file_spans
from curate.runtime.session import Session
from curate.runtime.stage import StageResult, committed, run_units
from curate.runtime.stream import fetch, put

_CELLS = 1 << 26  # tokens × latents of one encoding: a quarter of a GB in float32
_LISTS = {"latents": pa.int32(), "mean": pa.float32(), "max": pa.float32(), "peak": pa.int32()}


@dataclass(frozen=True)
class LatentActivationSpec:
    """`reader.model` is the model whose states the SAE reads. `token_budget`: padded tokens of a batch."""

    reader: ReaderSpec
    output: Output
    token_budget: int
    tokens: Tokens = "response"


def latent_recipe(
    corpus: dict[str, Any], reader: ReaderSpec, facts: dict[str, Any], sae: SAE, tokens: Tokens, code: str
) -> Recipe:
    """What latent activations are made from. `facts`: the identity of the model that reads, its precision included."""
    fields = {
        "code": code,
        "corpus": corpus,
        "model": facts,
        "tokenizer": tokenizer_digest(load_tokenizer(reader.model)),
        "max_tokens": reader.max_tokens,
        "overlong": reader.overlong,
        "sae": digest(sae),
        "tokens": tokens,
    }
    return Recipe("latents", fields)


@dataclass(frozen=True, eq=False)
class Fired:
    """What fired on the tokens of one row: see the columns of the parts."""

    latents: np.ndarray
    mean: np.ndarray
    max: np.ndarray
    peak: np.ndarray


def row_latents(
    sae: SAE, states: Sequence[Float[Tensor, "tokens d"]], starts: Sequence[int], cells: int = _CELLS
) -> list[Fired]:
    """Mean, maximum and its place of every latent that fires on the rows' tokens.

    Args:
        states: of each row's tokens, those that count alone. starts: number of each row's first such token.
        cells: tokens × latents that are computed at a time.
    """
    lengths = torch.tensor([len(s) for s in states])
    owner = torch.repeat_interleave(torch.arange(len(states)), lengths)
    place = torch.cat([torch.arange(a, a + len(s)) for a, s in zip(starts, states, strict=True)])
    keys, values, places = [], [], []
    step = max(1, cells // sae.latents)
    for rows, own, at in zip(torch.cat(list(states)).split(step), owner.split(step), place.split(step), strict=True):
        sparse = encode(sae, rows)
        on = sparse.active.cpu()
        values.append(sparse.values.cpu()[on].double())
        keys.append((own[:, None] * sae.latents + sparse.indices.cpu())[on])
        places.append(at[:, None].expand(on.shape)[on])
    key, a, at = (torch.cat(x) for x in (keys, values, places))
    unique, inverse = torch.unique(key, return_inverse=True)
    total = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, a)
    highest = torch.zeros(len(unique), dtype=torch.float64).scatter_reduce_(0, inverse, a, "amax")
    top = a == highest[inverse]
    first = torch.full((len(unique),), torch.iinfo(torch.int64).max)
    first = first.scatter_reduce_(0, inverse[top], at[top], "amin")
    of = torch.div(unique, sae.latents, rounding_mode="floor")
    cuts = torch.bincount(of, minlength=len(states)).cumsum(0)[:-1]
    columns = (unique % sae.latents, total / lengths[of], highest, first)
    kinds = ("<i4", "<f4", "<f4", "<i4")
    parts = [np.split(x.numpy().astype(kind), cuts) for x, kind in zip(columns, kinds, strict=True)]
    return [Fired(*row) for row in zip(*parts, strict=True)]


class LatentWorker:
    """One actor: a model up to the SAE's layer, a chunk in, a committed part out."""

    def __init__(self, spec: LatentActivationSpec, sae: Any, threads: int, peak_tflops: float | None) -> None:
        torch.set_num_threads(max(1, threads))
        self.spec = spec
        model = load_model(spec.reader.model)
        self.device = model.device
        self.cost, self.peak = model_cost(model), device_peak(model.device, model.dtype, peak_tflops)
        self.sae: SAE = fetch(sae).to(self.device)
        self.tap = LayerTap(model, [self.sae.layer])

    def __call__(self, item: bytes) -> bytes:
        began = time.perf_counter()
        chunk = Chunk.from_bytes(item)
        with torch.no_grad():
            found = self._run(chunk.rendered)
        bad = list(chunk.bad)
        good = [i for i, row in enumerate(found) if row is not None]
        for i in sorted(set(range(len(found))) - set(good)):
            e = chunk.examples[i]
            why = f"the states of layer {self.sae.layer} are not finite"
            bad.append(Quarantined(e.row, why, e.id, e.response[:200]))
        table = _table(chunk, good, [row for row in found if row is not None])
        self.spec.output.commit(Part(chunk.key, chunk.start, chunk.stop), table, bad)
        tokens = sum(len(r.input_ids) for r in chunk.rendered)
        return committed(chunk, bad, tokens, began, self._flops(chunk.rendered), self.peak)

    def _flops(self, rows: Sequence[Rendered]) -> float:
        """The forward to the SAE's layer, and its encoder on the tokens that count."""
        counted = sum(r.stop - (0 if self.spec.tokens == "all" else r.start) for r in rows)
        return self.cost.flops([r.stop for r in rows], self.sae.layer) + encode_flops(self.sae, counted)

    def _run(self, rows: Sequence[Rendered]) -> list[Fired | None]:
        out: list[Fired | None] = [None] * len(rows)
        for batch in token_batches([r.stop for r in rows], self.spec.token_budget):
            picked = [rows[i] for i in batch]
            ids, _ = collate([r.input_ids[: r.stop] for r in picked], 0, device=self.device)
            hidden = self.tap(ids)[self.sae.layer]
            firsts = [0 if self.spec.tokens == "all" else r.start for r in picked]
            states = [hidden[k, a : r.stop] for k, (a, r) in enumerate(zip(firsts, picked, strict=True))]
            sound = [k for k, s in enumerate(states) if bool(torch.isfinite(s).all())]
            if sound:
                fired = row_latents(self.sae, [states[k] for k in sound], [firsts[k] for k in sound])
                for k, row in zip(sound, fired, strict=True):
                    out[batch[k]] = row
        return out


def _table(chunk: Chunk, good: Sequence[int], found: Sequence[Fired]) -> pa.Table:
    examples, tokens = [chunk.examples[i] for i in good], [chunk.rendered[i] for i in good]
    columns: dict[str, pa.Array] = {
        "id": pa.array([e.id for e in examples], pa.string()),
        "row": pa.array([e.row for e in examples], pa.int64()),
        "label": pa.array([e.label for e in examples], pa.string()),
        "group": pa.array([e.group for e in examples], pa.string()),
        "prompt_tokens": pa.array([r.start for r in tokens], pa.int32()),
        "response_tokens": pa.array([r.stop - r.start for r in tokens], pa.int32()),
    }
    offsets = pa.array(np.cumsum([0, *(len(f.latents) for f in found)]), pa.int32())
    for name, kind in _LISTS.items():
        flat = np.concatenate([np.zeros(0, kind.to_pandas_dtype()), *(getattr(f, name) for f in found)])
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(flat, kind))
    return pa.table(columns)


def latent_activations(
    spec: LatentActivationSpec, sae: SAE, recipe: Recipe, manifest: Manifest, session: Session, max_bad_fraction: float
) -> StageResult:
    """Write the parts of `manifest`'s rows that are not there.

    Raises:
        RecipeError: the output holds the product of another recipe.
        CorpusError: more than `max_bad_fraction` of the rows are bad; parts and quarantine stay for inspection.
    """
    ref = put(sae.to("cpu"))
    make = partial(LatentWorker, spec, ref, max(1, round(session.scorers.cpus)), session.peak_tflops)
    read = partial(read_chunks, spec=spec.reader)
    return run_units(
        "latents", spec.output, recipe, manifest, make, session.scorers, read, session.readers, max_bad_fraction
    )


@dataclass(frozen=True, eq=False)
class LatentTable:
    """Latent activations of a run, read part by part. `rows` counts the run's rows, bad ones included; they are
    numbered file after file in manifest order (`spans`), as scores are."""

    urls: tuple[tuple[str, str], ...]
    spans: dict[str, tuple[int, int]]
    rows: int
    latents: int
    statistic: Statistic = "max"

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """(numbers of the rows, the wanted columns) of each part in order."""
        wanted = list(dict.fromkeys(["row", *columns]))
        for (key, _), table in zip(self.urls, read_parts([u for _, u in self.urls], wanted), strict=True):
            a, b = self.spans[key]
            rows = table["row"].to_numpy() + a
            if len(rows) and rows[-1] >= b:  # a part of a longer run
                table = table.filter(pa.array(rows < b))
                rows = rows[rows < b]
            yield rows, table

    def blocks(self) -> Iterator[LatentRows]:
        """The activations (their mean or maximum, by `statistic`), part by part."""
        for rows, table in self.tables(["latents", self.statistic]):
            lists, values = (table[name].combine_chunks() for name in ("latents", self.statistic))
            lengths = np.diff(lists.offsets.to_numpy()) if len(lists) else np.zeros(0, np.int64)
            fired, a = (x.flatten().to_numpy(zero_copy_only=False) for x in (lists, values))
            yield latent_rows(rows, lengths, fired, a, self.latents)

    def texts(self, column: Literal["id", "label", "group"]) -> np.ndarray:
        """A text column by row number; None where there is none."""
        out = np.full(self.rows, None, dtype=object)
        for rows, table in self.tables([column]):
            out[rows] = np.asarray(table[column].to_pylist(), dtype=object)
        return out


def latent_table(output: Output, manifest: Manifest, latents: int, statistic: Statistic = "max") -> LatentTable:
    """The parts of `manifest`'s rows in order, after the check that none is missing."""
    spans = file_spans(manifest)
    parts = sorted((p, u) for p, u in output.check_whole(manifest).items() if p.key in spans)
    keys = {key: k for k, key in enumerate(spans)}
    parts.sort(key=lambda x: (keys[x[0].key], x[0].start))
    rows = max((b for _, b in spans.values()), default=0)
    return LatentTable(tuple((p.key, u) for p, u in parts), spans, rows, latents, statistic)
