"""The activation store: states of every token of a corpus at many layers, by one forward pass, for SAEs to learn from.

In: a manifest, a model, layers. Out, below <store>/activations/<digest of what the states are made from>/:

    L<layer>/<file>/<start>-<stop>.<n>.safetensors   "x" [tokens, d]: the n-th shard of a row range, shuffled
    passes/<layers>/parts/<file>/<start>-<stop>.parquet   which token of which row each state is (shard, row,
                                                          position), in the order of the shards; written last
    passes/<layers>/recipe.json, quarantine/         as in output.py

The rows of a range are dealt to its shards by chance and the tokens of a shard are shuffled, so that a reader that
holds a few shards mixes many rows. Rows that are held out (a share, by chance of file and row number) are read and left
out, for what is measured afterwards. A layer that any whole pass has written is not computed again. Knows no SAE.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from connectors import storage
from curate import __version__
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import Part, part_name
from curate.corpus.recipe import Recipe
from curate.corpus.render import Rendered, tokenizer_digest
from curate.corpus.units import Manifest
from curate.models.batching import collate, token_batches
from curate.models.flops import model_cost
from curate.models.load import DTYPES, ModelSpec, load_model, load_tokenizer
from curate.models.peak import device_peak
from curate.models.pooling import span_mask
from curate.models.tap import LayerTap, width
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.session import Session
from curate.runtime.stage import StageResult, committed, run_units
from curate.training.activation_batches import Shard

SHARD_TOKENS = 8192  # all layers of a shard are in memory at once: 1 GB for 16 layers of the width 4,096 in bfloat16


@dataclass(frozen=True)
class ActivationSpec:
    """Which states. `model`: the model that is read, its precision decided; `tokens`: of the whole conversation, or the
    response's. `held_out`: share of the rows to leave out; `seed` decides which, and every order."""

    reader: ReaderSpec
    model: ModelSpec
    layers: tuple[int, ...]
    tokens: Literal["all", "response"]
    dtype: Literal["float32", "bfloat16"]
    held_out: float
    seed: int
    token_budget: int


@dataclass(frozen=True)
class Activations:
    """What a run has of states: the digest of what they are made from, and the shards of each layer, in order."""

    digest: str
    shards: Mapping[int, tuple[Shard, ...]]


def activation_recipe(spec: ActivationSpec, corpus: Mapping[str, Any], model: Mapping[str, Any]) -> Recipe:
    """What states are made from, whatever layer they are of. `corpus`, `model`: what these are, for recipes."""
    fields = {
        "code": __version__,
        "corpus": corpus,
        "model": model,
        "dtype": spec.model.dtype,
        "tokenizer": tokenizer_digest(load_tokenizer(spec.reader.model)),
        "max_tokens": spec.reader.max_tokens,
        "overlong": spec.reader.overlong,
        "tokens": spec.tokens,
        "stored": spec.dtype,
        "held_out": spec.held_out,
        "seed": spec.seed,
        "shard_tokens": SHARD_TOKENS,
    }
    return Recipe("activations", fields)


def store_activations(
    store: str,
    spec: ActivationSpec,
    corpus: Mapping[str, Any],
    model: Mapping[str, Any],
    manifest: Manifest,
    session: Session,
    max_bad_fraction: float,
) -> tuple[Activations, StageResult | None]:
    """States of all rows of `manifest` at all `spec.layers`: found, or computed now where they are missing.

    Raises:
        CorpusError: more than `max_bad_fraction` of the rows are bad, among them those with states that are not finite.
        RecipeError: the place holds the product of another recipe. ModelError: a layer that the model does not have.
    """
    recipe = activation_recipe(spec, corpus, model)
    url = storage.join(store, "activations", recipe.digest)
    missing = sorted(set(spec.layers) - set(_whole(url, manifest)))
    result = None
    if missing:
        output = _pass(url, missing)
        make = partial(
            _Writer, spec, url, tuple(missing), output, max(1, round(session.scorers.cpus)), session.peak_tflops
        )
        read = partial(read_chunks, spec=spec.reader)
        own = Recipe("activation pass", {**recipe.fields, "layers": missing})
        result = run_units(
            "activations", output, own, manifest, make, session.scorers, read, session.readers, max_bad_fraction
        )
    whole = _whole(url, manifest)
    counts = {place.url: _counts(place, manifest) for place in {whole[layer] for layer in spec.layers}}
    shards = {layer: tuple(_shards(url, layer, counts[whole[layer].url])) for layer in spec.layers}
    return Activations(recipe.digest, shards), result


def held_out_rows(key: str, rows: Int[np.ndarray, " n"], share: float, seed: int) -> Bool[np.ndarray, " n"]:
    """Which rows of the file `key` are left out: a function of file, row number and seed alone."""
    return chance(key, rows, seed) < share


def chance(key: str, rows: Int[np.ndarray, " n"], seed: int) -> np.ndarray:
    """A number in [0, 1) for each row of the file `key`, as if drawn at random (SplitMix64)."""
    start = np.random.SeedSequence([seed, zlib.crc32(key.encode())]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        x = start + np.asarray(rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2**53


# places


def _pass(url: str, layers: Sequence[int]) -> Output:
    """Where the parts of a pass over `layers` lie: named by runs of layers, 8-22 or 3,5,7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return Output(storage.join(url, "passes", ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)))


def _layers(name: str) -> Iterator[int]:
    """The inverse of the name."""
    for run in name.split(","):
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _whole(url: str, manifest: Manifest) -> dict[int, Output]:
    """The layers of which every row of `manifest` is there, and by which pass."""
    if not storage.exists(storage.join(url, "passes")):
        return {}
    out: dict[int, Output] = {}
    for found in storage.glob(storage.join(url, "passes", "*", "recipe.json")):
        name = found.url.rsplit("/", 2)[-2]
        place = Output(storage.join(url, "passes", name))
        if not place.remaining(manifest):
            out.update(dict.fromkeys(_layers(name), place))
    return out


def _counts(place: Output, manifest: Manifest) -> dict[Part, list[int]]:
    """Tokens of every shard of each part that belongs to `manifest`, in order."""
    stops: dict[str, int] = {}
    for u in manifest.units:
        stops[u.key] = max(u.stop, stops.get(u.key, 0))
    mine = {part: at for part, at in sorted(place.check_whole(manifest).items()) if part.start < stops.get(part.key, 0)}

    def read(where: str) -> list[int]:
        with storage.open_read(where) as f:
            return json.loads((pq.read_schema(f).metadata or {})[b"shards"])

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(mine, pool.map(read, mine.values()), strict=True))


def _shards(url: str, layer: int, counts: Mapping[Part, list[int]]) -> Iterator[Shard]:
    for part, tokens in counts.items():
        for i, n in enumerate(tokens):
            yield Shard(_shard_url(url, layer, part, i), n)


def _shard_url(url: str, layer: int, part: Part, i: int) -> str:
    return storage.join(url, f"L{layer}", part_name(part.key, part.start, part.stop, f"{i:04d}.safetensors"))


# the work


class _Writer:
    """One actor: a model that is read up to the highest layer; a chunk in, its shards and its part out."""

    def __init__(
        self,
        spec: ActivationSpec,
        url: str,
        layers: tuple[int, ...],
        output: Output,
        threads: int,
        peak_tflops: float | None,
    ) -> None:
        torch.set_num_threads(threads)
        self.spec, self.url, self.output = spec, url, output
        self.model = load_model(spec.model)
        self.tap = LayerTap(self.model, layers)
        self.width = width(self.model)
        self.cost = model_cost(self.model)
        self.peak = device_peak(self.model.device, self.model.dtype, peak_tflops)

    def __call__(self, item: bytes) -> bytes:
        began = time.perf_counter()
        chunk = Chunk.from_bytes(item)
        part = Part(chunk.key, chunk.start, chunk.stop)
        rng = np.random.default_rng([self.spec.seed, zlib.crc32(chunk.key.encode()), chunk.start])
        rows = np.array([e.row for e in chunk.examples], np.int64)
        kept = np.flatnonzero(~held_out_rows(chunk.key, rows, self.spec.held_out, self.spec.seed))
        bad = list(chunk.bad)
        index: dict[str, list[np.ndarray]] = {"shard": [], "row": [], "position": []}
        counts: list[int] = []
        for group in self._groups(chunk.rendered, rng.permutation(kept)):
            states, row, position, wrong = self._states([chunk.rendered[i] for i in group])
            for i, layer in wrong.items():
                e = chunk.examples[group[i]]
                reason = f"the activations of layer {layer} are not finite"
                bad.append(Quarantined(e.row, reason, e.id, e.messages[-1].content[:200]))
            order = rng.permutation(np.flatnonzero(~np.isin(row, list(wrong))))
            if not len(order):
                continue
            at = torch.from_numpy(order)
            for layer, x in states.items():
                blob = safetensors.torch.save({"x": x[at].contiguous()})
                storage.write_atomic(_shard_url(self.url, layer, part, len(counts)), blob)
            index["shard"].append(np.full(len(order), len(counts), np.int32))
            index["row"].append(rows[np.asarray(group)][row[order]])
            index["position"].append(position[order])
            counts.append(len(order))
        self.output.commit(part, _index(index, counts), bad)
        lengths = [len(chunk.rendered[i].input_ids) for i in kept]
        return committed(chunk, bad, sum(lengths), began, self.cost.flops(lengths, max(self.tap.layers)), self.peak)

    def _groups(self, rendered: Sequence[Rendered], order: np.ndarray) -> Iterator[list[int]]:
        """Rows, in that order, up to a shard's tokens."""
        group: list[int] = []
        size = 0
        for i in order.tolist():
            n = _span(rendered[i], self.spec.tokens)
            if group and size + n[1] - n[0] > SHARD_TOKENS:
                yield group
                group, size = [], 0
            group.append(i)
            size += n[1] - n[0]
        if group:
            yield group

    def _states(self, rendered: Sequence[Rendered]) -> tuple[dict[int, Tensor], np.ndarray, np.ndarray, dict[int, int]]:
        """States of all wanted tokens, row by row, on the CPU; of each its row (in the group) and position; and the
        rows with a state that is not finite, with the first layer where that is so."""
        spans = [_span(r, self.spec.tokens) for r in rendered]
        lengths = np.array([stop - start for start, stop in spans])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        dtype = DTYPES[self.spec.dtype]
        states = {layer: torch.empty((int(offsets[-1]), self.width), dtype=dtype) for layer in self.tap.layers}
        wrong: dict[int, int] = {}
        for batch in token_batches([len(r.input_ids) for r in rendered], self.spec.token_budget):
            ids, _ = collate([rendered[i].input_ids for i in batch], 0, device=self.model.device)
            seen = self.tap(ids)
            mask = span_mask([spans[i][0] for i in batch], [spans[i][1] for i in batch], ids.shape[1], ids.device)
            places = torch.from_numpy(np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch]))
            for layer, state in seen.items():
                x = state[mask].to(dtype)
                finite = torch.isfinite(x).all(-1).cpu().numpy()
                if not finite.all():
                    of = np.repeat(batch, lengths[batch])
                    for i in np.unique(of[~finite]).tolist():
                        wrong.setdefault(i, layer)
                states[layer][places] = x.cpu()
        row = np.repeat(np.arange(len(rendered)), lengths)
        position = np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
        return states, row, position, wrong


def _span(row: Rendered, tokens: str) -> tuple[int, int]:
    return (row.start, row.stop) if tokens == "response" else (0, len(row.input_ids))


def _index(columns: Mapping[str, Sequence[np.ndarray]], counts: Sequence[int]) -> pa.Table:
    types = {"shard": pa.int32(), "row": pa.int64(), "position": pa.int32()}
    arrays = {name: pa.array(np.concatenate(columns[name]) if counts else [], t) for name, t in types.items()}
    return pa.table(arrays).replace_schema_metadata({b"shards": json.dumps(list(counts)).encode()})
