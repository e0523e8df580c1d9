"""Test vectors by conjugate gradients, on a crew of differentiating actors (METHODS §5).

The gradients are spread over the actors, `block` of them a job: an actor holds all sampled rows and solves its block by
itself, with one product a step for the whole block. So nothing but files goes between actors, and a kill costs the
steps since a block's last file:

    <url>.work/damping.json             λ, where it is relative to the curvature (found once, for all blocks)
    <url>.work/<block>.safetensors      x, r, p and what the report says, every `save_every` steps
    <url>.safetensors, <url>.json       the test vector, when all blocks have ended; then the work is removed

Cost: a product is 4-6 forwards of the sampled rows a gradient (products.py), so a test vector of Q gradients takes
about 5 Q · rows · iterations forwards, divided by the actors, of which no more than Q / block can work. An actor's
memory holds 6 vectors of each gradient of its block (24 bytes a tracked weight) and the rows' states.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from connectors import storage
from curate.corpus.render import Rendered
from curate.corpus.spread import Piece, count, draw
from curate.corpus.units import Manifest
from curate.curvature import conjugate_gradient as cg
from curate.curvature import test_vector as files
from curate.curvature.behaviour import Behaviour, Gradients, query_gradients
from curate.curvature.blocks import Block, Dense, cut, squared
from curate.curvature.conjugate_gradient import CGSpec, Report, State
from curate.curvature.ekfac import Damping
from curate.curvature.fisher import Reduction
from curate.curvature.items import check_items, item_gradients
from curate.curvature.products import Products
from curate.curvature.queries import Query
from curate.curvature.test_vector import TestVector
from curate.errors import CorpusError, CurvatureError
from curate.models.tap import n_layers
from curate.models.tracked import TrackedLayer
from curate.runtime import partials
from curate.runtime.crew import Crew
from curate.runtime.differentiator import Differentiator
from curate.runtime.events import say
from curate.runtime.memory import free_bytes
from curate.runtime.reader import ReaderSpec, read_pieces

FEW_ROWS = 4  # a loss of so few rows is unstable (METHODS §5)
_VECTORS = 6


@dataclass(frozen=True)
class CGRows:
    """How to solve, and the rows whose mean loss the curvature is of: drawn from `manifest`, cut as `reader` does. Of
    them `max_bad_fraction` may be unusable."""

    spec: CGSpec
    reader: ReaderSpec
    manifest: Manifest
    reduction: Reduction = "mean"
    max_bad_fraction: float = 1.0


@dataclass(frozen=True)
class CGVector:
    """One test vector to solve for. `url`: where it is kept, without suffix. `each`: a name for each query and not for
    each behaviour, of which there is then one. `meta`: what its file says beside the solve."""

    method: str
    url: str
    behaviours: Sequence[Behaviour]
    queries: Sequence[Query]
    each: bool
    rows: CGRows
    damping: Damping
    rank: int | None
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Sample:
    """What an actor reads its rows from."""

    pieces: Sequence[Piece]
    reader: ReaderSpec
    reduction: Reduction
    spec: CGSpec
    max_bad_fraction: float


@dataclass(frozen=True)
class _Block:
    """Gradients that are solved side by side: of one behaviour for each query (`each`), or of some behaviours."""

    url: str
    names: tuple[str, ...]
    behaviours: Sequence[Behaviour]
    queries: Sequence[Query]
    each: bool
    top: int | None
    sample: _Sample
    damping: float


@dataclass(frozen=True)
class _Whole:
    """The test vector, to be put together from what its blocks have solved."""

    url: str
    names: tuple[str, ...]
    rank: int | None
    meta: dict[str, Any]
    blocks: Sequence[_Block]


def solve_by_cg(vector: CGVector, crew: Crew) -> str:
    """Make the test vector, or go on with it; what there is to tell of it.

    Raises:
        CurvatureError: gradients that are zero or not finite; no usable row; a solve that did not take a step; more
            memory than an actor's device has.
        CorpusError: more than `max_bad_fraction` of the drawn rows cannot be used.
        ConfigError: a behaviour reads a layer below which nothing is tracked.
    """
    spec, rows = vector.rows.spec, vector.rows
    sample = _Sample(
        draw(rows.manifest, spec.rows, spec.seed), rows.reader, rows.reduction, spec, rows.max_bad_fraction
    )
    if count(sample.pieces) <= FEW_ROWS:
        say(f"WARNING: curvature of {count(sample.pieces)} rows; so few make it unstable (curvature.rows)")
    work = f"{vector.url}.work"
    blocks = _blocks(vector, sample, work, vector.damping.value)
    if vector.damping.kind == "relative":
        damping = vector.damping.value * _mean(storage.join(work, "damping.json"), blocks, crew)
        blocks = _blocks(vector, sample, work, damping)
    reports: dict[str, Report] = {}
    waiting = list(blocks)
    while waiting:
        for at, report, ended in crew.map(_advance, waiting):
            steps, shown = max(report.iterations), ", ".join(f"{r:.2g}" for r in report.last)
            say(f"cg {vector.method} ({short(report.names)}): step {steps} of {spec.iterations}, residuals {shown}")
            if ended:
                reports[at] = report
        waiting = [block for block in blocks if block.url not in reports]
    report = Report.join([reports[block.url] for block in blocks])
    for warning in report.warnings(spec.tolerance):
        say(f"WARNING: cg {vector.method}: {warning}")
    solve = {**asdict(spec), "drawn": count(sample.pieces), "damping": report.damping, "items": report.body()}
    meta = {**vector.meta, "damping": asdict(vector.damping), "cg": solve}
    names = [q.id for q in vector.queries] if vector.each else [b.name for b in vector.behaviours]
    next(iter(crew.map(_put_together, [_Whole(vector.url, tuple(names), vector.rank, meta, blocks)])))
    partials.remove(work)
    return str(report)


def short(names: Sequence[str]) -> str:
    """Names for a line of progress."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]}"


def _blocks(vector: CGVector, sample: _Sample, work: str, damping: float) -> list[_Block]:
    """Cut by nothing but the names and `block`, so that any number of actors goes on with the same files."""
    size = sample.spec.block
    found: list[tuple[tuple[str, ...], Sequence[Behaviour], Sequence[Query], int | None]] = []
    if vector.each:
        check_items(vector.queries)
        (behaviour,) = vector.behaviours
        for i in range(0, len(vector.queries), size):
            part = vector.queries[i : i + size]
            found.append((tuple(q.id for q in part), [behaviour], part, behaviour.top))
    else:
        # Each is solved among the layers that it reaches itself, whatever else is measured.
        for top in dict.fromkeys(b.top for b in vector.behaviours):
            alike = [b for b in vector.behaviours if b.top == top]
            for i in range(0, len(alike), size):
                few = alike[i : i + size]
                found.append((tuple(b.name for b in few), few, vector.queries, top))
    out = []
    for i, (names, behaviours, queries, top) in enumerate(found):
        mark = hashlib.blake2b(json.dumps(names).encode(), digest_size=6).hexdigest()
        url = storage.join(work, f"{i:04d}-{mark}.safetensors")
        out.append(_Block(url, names, behaviours, queries, vector.each, top, sample, damping))
    return out


# in an actor


def _reached(state: Differentiator, top: int | None) -> list[TrackedLayer]:
    last = n_layers(state.model) if top is None else top
    return [layer for layer in state.layers if layer.block < last]


def _products(state: Differentiator, block: _Block) -> Products:
    sample = block.sample

    def make() -> Products:
        layers = _reached(state, block.top)
        rows = _rows(sample)
        spec, budget = sample.spec, state.spec.token_budget
        return Products(state.model, layers, rows, spec.product, sample.reduction, budget, state.pad_id, state.sae)

    return state.kept(f"products {block.url.rpartition('/')[0]} {block.top}", make)


def _rows(sample: _Sample) -> list[Rendered]:
    good: list[Rendered] = []
    bad = 0
    for chunk in read_pieces(sample.pieces, sample.reader):
        usable = [row for row in chunk.rendered if row.end > max(row.start, 1)]
        good += usable
        bad += len(chunk.bad) + len(chunk.rendered) - len(usable)
    if not good:
        raise CurvatureError(
            f"none of the {bad} rows drawn for the curvature can be used (no response token within "
            f"curvature.max_tokens={sample.reader.max_tokens}, or unreadable); raise it, or mend the corpus"
        )
    if bad > sample.max_bad_fraction * (len(good) + bad):
        raise CorpusError(
            f"{bad} of {len(good) + bad} rows drawn for the curvature are bad, more than source.max_bad_fraction="
            f"{sample.max_bad_fraction:g} allows: unreadable, or without a response token within "
            f"curvature.max_tokens={sample.reader.max_tokens}. Mend the source or raise the limit and run again."
        )
    return good


def _mean(url: str, blocks: Sequence[_Block], crew: Crew) -> float:
    """The mean eigenvalue of the curvature among the layers of the first block, found once and kept."""
    if storage.exists(url):
        return float(json.loads(storage.read_text(url))["mean_eigenvalue"])
    mean = next(iter(crew.map(_estimate, blocks[:1])))
    storage.write_atomic(url, json.dumps({"mean_eigenvalue": mean}))
    return mean


def _estimate(state: Differentiator, block: _Block) -> float:
    products = _products(state, block)
    like = {layer.name: _empty(state, layer, 0) for layer in products.layers}
    return cg.mean_eigenvalue(products, like, block.sample.spec.seed)


def _empty(state: Differentiator, layer: TrackedLayer, q: int) -> Tensor:
    wide = torch.promote_types(state.model.dtype, torch.float32)
    return torch.zeros((q, layer.out, layer.width), dtype=wide, device=state.device)


def _advance(state: Differentiator, block: _Block) -> tuple[str, Report, bool]:
    """`save_every` more steps of a block, and its file: (where, how it stands, whether it has ended)."""
    spec, there = block.sample.spec, storage.exists(block.url)
    if there:
        told = State.from_tensors(partials.read(block.url, lambda key: key.startswith(cg.FACT)))
        if _ended(told, spec):
            return block.url, cg.finish(told, block.damping, spec.tolerance, block.names), True
        now = State.from_tensors(partials.read(block.url), state.device)
    else:
        now = cg.start(_gradients(state, block), block.names)
    until = min(now.steps + spec.save_every, spec.iterations)
    cg.advance(now, _products(state, block), block.damping, until, spec.tolerance, block.names)
    report = cg.finish(now, block.damping, spec.tolerance, block.names)  # before its file: an error is no result
    partials.save(block.url, now.tensors())
    return block.url, report, _ended(now, spec)


def _ended(now: State, spec: CGSpec) -> bool:
    return now.steps >= spec.iterations or not bool(now.running(spec.tolerance).any())


def _gradients(state: Differentiator, block: _Block) -> dict[str, Tensor]:
    """∇f of the block's names by layer, on the actor's device; zero where one reaches no layer."""
    layers = _reached(state, block.top)
    need, free = 4 * _VECTORS * len(block.names) * sum(x.size for x in layers), free_bytes(state.device)
    if need > free:
        raise CurvatureError(
            f"solving for {len(block.names)} gradients of {len(layers)} layers at once takes {need:,} bytes, and "
            f"{state.device} has {free:,} free beside the model; lower curvature.block, or track fewer layers with "
            f"curvature.layers.kind, curvature.layers.first, curvature.layers.last or curvature.layers.stride"
        )
    found: Gradients
    with state.inserted():
        if block.each:
            found = item_gradients(state.model, state.layers, block.behaviours[0], block.queries, state.pad_id)
        else:
            found = query_gradients(state.model, state.layers, block.behaviours, block.queries, state.pad_id)
    out = {}
    for layer in layers:
        out[layer.name] = _empty(state, layer, len(block.names))
        for q, name in enumerate(block.names):
            if layer.name in found[name]:
                out[layer.name][q] = found[name].pop(layer.name).to(out[layer.name])
    return out


def _put_together(state: Differentiator, job: _Whole) -> str:
    """The blocks' x as one test vector, a layer at a time."""
    place = {name: q for q, name in enumerate(job.names)}
    layers = [layer for layer in state.layers if any(layer in _reached(state, block.top) for block in job.blocks)]
    energy = torch.zeros(len(job.names), dtype=torch.float64)
    parts: dict[str, Block] = {}
    for layer in layers:
        values = torch.zeros((len(job.names), layer.out, layer.width))
        for block in job.blocks:
            found = partials.read(block.url, partial(operator.eq, f"x/{layer.name}"))
            for x in found.values():  # none where the block's behaviours do not reach the layer
                values[[place[name] for name in block.names]] = x.to(values)
        dense = Dense(values)
        energy += squared(dense)
        parts[layer.name] = dense if job.rank is None else cut(dense, job.rank)
    made = TestVector(job.names, tuple(layers), parts, {**job.meta, "coverage": asdict(state.coverage)})
    files.save(made if job.rank is None else files.with_energy(made, job.rank, energy), job.url)
    return job.url
