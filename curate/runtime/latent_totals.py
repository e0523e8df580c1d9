"""Totals of latent influence: what the parts say of each item, each latent, each row; read as a stream.

In: parts of the latent-influence stage. Out: for each item the importance of every latent (paper B: s_k, the mean over
the candidate rows) and its rows of the highest and lowest scores, with their tokens; a table of all pairs, written as
it is read; the strongest contexts of chosen latents. Holds items × latents numbers and a few rows an item. Knows no
model.
"""

from __future__ import annotations

import heapq
from bisect import insort_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from numpy.typing import NDArray

from connectors import storage
from curate.corpus.units import Manifest
from curate.runtime.gradient_cosine import tables
from curate.runtime.output import Output

Place = tuple[str, int]
"""A row: key of its file, number within it."""
_FACTS = ["id", "row", "label", "group", "item", "cosine", "score"]
_LATENTS = ["latents", "influence", "latent_activation", "latent_tokens"]
_TOKENS = ["token_position", "token_latent", "token_influence", "token_activation"]
_SPANS = ["prompt_tokens", "response_tokens"]
_TABLE = pa.schema(
    [
        ("item", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("cosine", pa.float32()),
        ("score", pa.float64()),
        ("latents", pa.list_(pa.int32())),
        ("influence", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, eq=False)
class Pair:
    """A row and what it does to one item. latents: all that fire in it with their influence, those of the largest
    |influence| first. tokens: of each kept firing its position, latent, influence and activation."""

    place: Place
    id: str
    label: str | None
    group: str | None
    cosine: float | None
    score: float
    latents: tuple[tuple[int, float], ...]
    tokens: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Totals:
    """`pairs` [q]: candidate rows scored for each item. `importance` [q, h]: the mean over them of each latent's
    influence, zero where it does not fire. `frequency` [h]: of the tokens of all candidate rows, the share on which it
    fires. `best`, `worst`: an item's rows of the highest scores, highest first, and of the lowest, lowest first."""

    pairs: Int[np.ndarray, " q"]
    importance: Float[np.ndarray, "q h"]
    frequency: Float[np.ndarray, " h"]
    best: tuple[tuple[Pair, ...], ...]
    worst: tuple[tuple[Pair, ...], ...]


@dataclass(frozen=True)
class Firing:
    """Where a latent fires: the row, the token, how strongly."""

    place: Place
    id: str
    position: int
    activation: float


class _Best:
    """The `n` pairs of the largest key; of equal ones the first."""

    def __init__(self, n: int) -> None:
        self.n, self.heap, self.seen = n, list[tuple[float, int, Pair]](), 0

    def offer(self, key: float, make: Callable[[], Pair]) -> None:
        self.seen += 1
        if len(self.heap) < self.n:
            heapq.heappush(self.heap, (key, -self.seen, make()))
        elif self.n and key > self.heap[0][0]:
            heapq.heapreplace(self.heap, (key, -self.seen, make()))

    def pairs(self) -> tuple[Pair, ...]:
        return tuple(pair for _, _, pair in sorted(self.heap, key=lambda x: x[:2], reverse=True))


def totals(
    output: Output,
    manifest: Manifest,
    items: Sequence[str],
    latents: int,
    rows: int,
    shown: int,
    table_url: str,
    sign: Literal["ours", "paper"] = "ours",
) -> Totals:
    """One pass over all parts of `manifest`.

    Args:
        latents: h, of the SAE. rows: of each item, at either end. shown: latents of a row that are named.
        table_url: of the Parquet file with all pairs: item, row, score and the `shown` latents; its numbers alone have
            the `sign` that is asked for (paper: positive = raises the item's loss).

    Raises:
        CorpusError: the parts do not cover the manifest.
    """
    number = {name: q for q, name in enumerate(items)}
    q, h = len(items), latents
    importance, pairs = np.zeros((q, h)), np.zeros(q, np.int64)
    fires, tokens = np.zeros(h), 0
    best, worst = [_Best(rows) for _ in items], [_Best(rows) for _ in items]
    columns = _FACTS + _SPANS + _LATENTS + _TOKENS
    with storage.atomic_writer(table_url) as sink, pq.ParquetWriter(sink, _TABLE, compression="zstd") as writer:
        for key, part in tables(output, manifest, columns):
            facts = part.select(_FACTS).to_pylist()
            which = np.array([number[f["item"]] for f in facts], np.int64)
            pairs += np.bincount(which, minlength=q)
            lists = {name: _Lists(part[name]) for name in _LATENTS + _TOKENS}
            at = lists["latents"]
            np.add.at(importance, (np.repeat(which, at.counts), at.values), lists["influence"].values)
            number_of_row = np.array([f["row"] for f in facts], np.int64)
            _, first = np.unique(number_of_row, return_index=True)  # a row stands here once an item
            once = np.zeros(len(facts), bool)
            once[first] = True
            mine = np.repeat(once, at.counts)
            np.add.at(fires, at.values[mine], lists["latent_tokens"].values[mine])
            tokens += sum(int(np.sum(part[name].to_numpy()[once])) for name in _SPANS)
            named = []
            for i, f in enumerate(facts):
                named.append(_strongest(lists["latents"][i], lists["influence"][i], shown))
                make = partial(_pair, key, f, lists, i)
                best[which[i]].offer(f["score"], make)
                worst[which[i]].offer(-f["score"], make)
            writer.write_table(_pairs_table(facts, key, named, 1.0 if sign == "ours" else -1.0))
    return Totals(
        pairs,
        importance / np.maximum(pairs, 1)[:, None],
        fires / max(tokens, 1),
        tuple(b.pairs() for b in best),
        tuple(w.pairs() for w in worst),
    )


def contexts(output: Output, manifest: Manifest, latents: Sequence[int], n: int) -> dict[int, list[Firing]]:
    """Of each of `latents` its `n` (≥ 1) strongest firings, strongest first: of a row one, and of those after the same
    words one. Reads the firings that the parts kept."""
    wanted = np.array(sorted(set(latents)), np.int64)
    found: dict[int, list[Firing]] = {int(k): [] for k in wanted}
    for key, part in tables(output, manifest, ["id", "row", "token_position", "token_latent", "token_activation"]):
        latent, position = _Lists(part["token_latent"]), _Lists(part["token_position"]).values
        activation = _Lists(part["token_activation"]).values
        pair = np.repeat(np.arange(len(part)), latent.counts)
        ids, rows = part["id"].to_pylist(), part["row"].to_pylist()
        chosen = np.flatnonzero(np.isin(latent.values, wanted))
        for j in chosen[np.argsort(-activation[chosen], kind="stable")]:
            mine, place = found[int(latent.values[j])], (key, rows[pair[j]])
            one = Firing(place, ids[pair[j]], int(position[j]), float(activation[j]))
            if (len(mine) == n and one.activation <= mine[-1].activation) or any(_alike(one, f) for f in mine):
                continue
            insort_right(mine, one, key=lambda f: -f.activation)
            del mine[n:]
    return found


def _alike(one: Firing, other: Firing) -> bool:
    """Of one row; or after the same words (what a chat template begins with, say), where a state is the same."""
    near = abs(one.activation - other.activation) <= 1e-4 * other.activation
    return one.place == other.place or (one.position == other.position and near)


def firings(output: Output, manifest: Manifest, places: set[Place]) -> dict[Place, dict[tuple[int, int], float]]:
    """{row: {(token, latent): activation}} of the firings that the parts kept of the rows at `places`."""
    out: dict[Place, dict[tuple[int, int], float]] = {place: {} for place in places}
    for key, part in tables(output, manifest, ["row", "token_position", "token_latent", "token_activation"]):
        lists = [_Lists(part[name]) for name in ("token_position", "token_latent", "token_activation")]
        for i, row in enumerate(part["row"].to_pylist()):
            if (mine := out.get((key, row))) is not None:
                position, latent, activation = (of[i].tolist() for of in lists)
                mine.update(zip(zip(position, latent, strict=True), activation, strict=True))
    return out


class _Lists:
    """A list column as one array: `values`, how many a row has (`counts`), and row i as `self[i]`."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.counts: NDArray[np.int64] = pc.list_value_length(column).to_numpy().astype(np.int64)
        self.values: NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        self._stops = np.cumsum(self.counts)

    def __getitem__(self, i: int) -> NDArray[Any]:
        return self.values[self._stops[i] - self.counts[i] : self._stops[i]]


def _pair(key: str, f: Mapping[str, Any], lists: Mapping[str, _Lists], i: int) -> Pair:
    latents, influence = lists["latents"][i], lists["influence"][i]
    position, latent, through, activation = (lists[name][i].copy() for name in _TOKENS)
    told = (f["id"], f["label"], f["group"], f["cosine"], f["score"], _strongest(latents, influence, len(latents)))
    return Pair((key, f["row"]), *told, (position, latent, through, activation))


def _strongest(latents: NDArray[np.int32], influence: NDArray[np.float32], n: int) -> tuple[tuple[int, float], ...]:
    order = np.argsort(-np.abs(influence), kind="stable")[:n]
    return tuple(zip(latents[order].tolist(), influence[order].tolist(), strict=True))


def _pairs_table(
    facts: list[dict[str, Any]], key: str, named: Sequence[Sequence[tuple[int, float]]], factor: float
) -> pa.Table:
    def rows() -> Iterator[dict[str, Any]]:
        for f, latents in zip(facts, named, strict=True):
            influence = [factor * v for _, v in latents]
            signed = {"score": factor * f["score"], "latents": [k for k, _ in latents], "influence": influence}
            yield {**f, "source": key, **signed}

    return pa.Table.from_pylist(list(rows()), schema=_TABLE)
