"""The plan: what a run will cost, from the manifest, a sample of rows and a short calibration on the pool."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from curate.concepts.concept import Concept
from curate.corpus.chunk import Chunk
from curate.corpus.render import Rendered
from curate.corpus.units import Manifest, Unit
from curate.curvature.blocks import Block, Dense, LowRank
from curate.curvature.test_vector import TestVector, TestVectorHeader
from curate.errors import CorpusError
from curate.models.engines import GenerationSpec, make_engine, row_seed
from curate.models.flops import cost_of
from curate.models.load import ModelSpec
from curate.models.tap import n_layers
from curate.models.tracked import LayerChoice, TrackedLayer, tracked_layers
from curate.runtime.reader import ReaderSpec, read_pieces
from curate.runtime.score import load_models
from curate.runtime.session import Pool, Session
from curate.runtime.stream import fetch, put, stream
from curate.scoring.base import Needs
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass

SAMPLE_UNITS = 8
SAMPLE_ROWS = 32
CALIBRATION_SECONDS = 8.0
GENERATED = 16
BYTES_PER_SCORE = 8
BYTES_PER_ROW = 40


@dataclass(frozen=True)
class InfluencePlan:
    """What influence scorers will need. `reads`: {method: (behaviour, the layer it reads)}; `rank` of test vectors;
    `fit_rows` to be fitted (0: factors are there, or none are used), each in `passes`."""

    tuned: ModelSpec
    layers: LayerChoice
    reads: Mapping[str, Sequence[tuple[str, int | None]]]
    rank: int | None
    fit_rows: int
    passes: int

    def headers(self) -> dict[str, TestVectorHeader]:
        """Names of columns, for a driver without a model."""
        return {m: TestVectorHeader(tuple(name for name, _ in r), (), {}, "") for m, r in self.reads.items()}

    def stand_ins(self, model: PreTrainedModel) -> dict[str, TestVector]:
        """Test vectors of the size of those that the run will make, for a measurement of its speed."""
        tracked, _ = tracked_layers(model, self.layers)
        out = {}
        for method, reads in self.reads.items():
            top = max(n_layers(model) if layer is None else layer for _, layer in reads)
            layers = tuple(layer for layer in tracked if layer.block < top)
            blocks = {layer.name: self._block(len(reads), layer) for layer in layers}
            out[method] = TestVector(tuple(name for name, _ in reads), layers, blocks)
        return out

    def _block(self, n: int, layer: TrackedLayer) -> Block:
        if self.rank is None:
            return Dense(torch.ones((n, layer.out, layer.width)))
        r = min(self.rank, layer.out, layer.width)
        return LowRank(torch.ones((n, layer.out, r)), torch.ones((n, r, layer.width)))


@dataclass(frozen=True)
class PlanSpec:
    reader: ReaderSpec
    scorers: Mapping[str, Mapping[str, Any]]
    generation: GenerationSpec
    generate_rows: int | None
    token_budget: int
    gradient_token_budget: int
    seed: int
    influence: InfluencePlan | None = None


class CalibrationWorker:
    """One actor: scores sampled rows for a few seconds, generates a handful of responses where a scorer needs them."""

    def __init__(self, spec: PlanSpec, concepts: Any, threads: int) -> None:
        torch.set_num_threads(max(1, threads))
        self.spec = spec
        headers = spec.influence.headers() if spec.influence else {}
        self.needs = Needs.union(s.needs() for s in make_scorers(spec.scorers, fetch(concepts), test_vectors=headers))
        model, tuned = load_models(self.needs, spec.reader.model, spec.influence.tuned if spec.influence else None)
        vectors = spec.influence.stand_ins(tuned) if spec.influence and tuned is not None else {}
        self.bytes = max((sum(a.nbytes for a in v.to_arrays().values()) for v in vectors.values()), default=0)
        scorers = make_scorers(spec.scorers, fetch(concepts), test_vectors=vectors)
        budget, gradients = spec.token_budget, spec.gradient_token_budget
        self.shared = SharedPass(model, scorers, budget, tuned=tuned, gradient_tokens=gradients)

    def __call__(self, item: bytes) -> bytes:
        chunk = Chunk.from_bytes(item)
        own = chunk.rendered if self.needs.generated else None
        size = max(1, len(chunk.examples) // 8)
        tokens, rows, flops = 0, 0, 0.0
        began = time.perf_counter()
        self.shared.run(chunk.examples[:1], chunk.rendered[:1], own[:1] if own else None)  # warm-up
        began = time.perf_counter()
        for at in range(0, len(chunk.examples), size):
            part = slice(at, at + size)
            done = self.shared.run(chunk.examples[part], chunk.rendered[part], own[part] if own else None)
            tokens += done.stats.tokens
            rows += done.stats.rows
            flops += done.stats.flops
            if time.perf_counter() - began > CALIBRATION_SECONDS:
                break
        seconds = time.perf_counter() - began
        found = {"tokens": tokens, "rows": rows, "seconds": seconds, "flops": flops, "bytes": self.bytes}
        return json.dumps(found).encode()


class GenerationCalibration:
    """One actor: a handful of responses. An actor of its own, as an engine does not share a process with scorers."""

    def __init__(self, spec: PlanSpec) -> None:
        self.engine = make_engine(spec.reader.model, spec.generation)

    def __call__(self, item: bytes) -> bytes:
        chunk = Chunk.from_bytes(item)
        prompts = [r.input_ids[: r.start] for r in chunk.rendered]
        seeds = [row_seed(0, e.id) for e in chunk.examples]
        began = time.perf_counter()
        self.engine.generate(prompts, seeds)
        return json.dumps({"rows": len(prompts), "seconds": time.perf_counter() - began}).encode()


def _generation_worker(spec: PlanSpec) -> Callable[[bytes], bytes]:
    return GenerationCalibration(spec)


def _worker(spec: PlanSpec, concepts: Any, threads: int) -> Callable[[bytes], bytes]:
    return CalibrationWorker(spec, concepts, threads)


def sample_chunks(spec: ReaderSpec, manifest: Manifest, seed: int) -> list[Chunk]:
    """Rows from the start of units spread over the corpus (a compressed stream is read from its beginning only)."""
    rng = np.random.default_rng(seed)
    units = list(manifest.units)
    picked = sorted(rng.choice(len(units), size=min(SAMPLE_UNITS, len(units)), replace=False))
    chunks: list[Chunk] = []
    for i in picked:
        u: Unit = units[i]
        stop = min(u.start + SAMPLE_ROWS, u.stop)
        chunks.extend(read_pieces([(u, [(u.start, stop)])], spec))
    return chunks


def make_plan(spec: PlanSpec, manifest: Manifest, concepts: Sequence[Concept], session: Session) -> str:
    """The plan as text.

    Raises:
        CorpusError: none of the sampled rows can be used.
    """
    chunks = sample_chunks(spec.reader, manifest, spec.seed)
    examples = [e for c in chunks for e in c.examples]
    rendered = [r for c in chunks for r in c.rendered]
    seen = sum(c.stop - c.start for c in chunks)
    bad = [b for c in chunks for b in c.bad]
    if not rendered:
        raise CorpusError(f"none of the {seen} sampled rows can be used; the first reason: {bad[0].reason}")
    share = len(rendered) / seen
    good_rows = manifest.rows * share
    headers = spec.influence.headers() if spec.influence else {}
    scorers = make_scorers(spec.scorers, concepts, test_vectors=headers)
    needs = Needs.union(s.needs() for s in scorers)

    def measured(n: int, make: Callable[[], Callable[[bytes], bytes]], pool: Pool) -> dict[str, float]:
        own: list[tuple[str, Rendered] | None] = [None] * n
        item = Chunk("", 0, n, examples[:n], rendered[:n], own).to_bytes()
        return json.loads(next(iter(stream([item], make, replace(pool, size=1)))))

    ref = put(list(concepts))
    pool = session.scorers
    scored = measured(len(examples), partial(_worker, spec, ref, max(1, round(pool.cpus))), pool)
    seconds = max(scored["seconds"], 1e-9)
    lengths = np.array([r.stop for r in rendered])
    mean = float(lengths.mean())
    error = 1.96 * float(lengths.std(ddof=1)) / len(lengths) ** 0.5 if len(lengths) > 1 else 0.0
    deepest = None if needs.gradients or needs.tuned else max(needs.layers | needs.generated | needs.states, default=0)
    reach = "forward to the last layer and back" if deepest is None else f"forward to layer {deepest}"
    flops = scored["flops"] / scored["rows"] if needs.tuned else _flops(spec, needs, rendered, deepest)
    columns = sum(len(s.columns()) for s in scorers)
    written = manifest.rows * (columns * BYTES_PER_SCORE + BYTES_PER_ROW)
    lines = [
        ("rows", f"{manifest.rows:,} in {len(manifest.files)} file(s), {len(manifest.units):,} units"),
        ("bad rows", f"{1 - share:.1%} of {seen} sampled" + (f", the first: {bad[0].reason}" if bad else "")),
        (
            "tokens a row",
            f"mean {mean:.0f}, median {np.median(lengths):.0f}, 95 % below {np.quantile(lengths, 0.95):.0f}, "
            f"largest {lengths.max()} (of {len(lengths)} sampled)",
        ),
        ("tokens", f"{mean * good_rows:,.0f} ± {error * good_rows:,.0f} (95 % of the sampling error)"),
        ("FLOPs", f"{flops * good_rows:.3g}, {reach}"),
        ("pool", f"{pool.size} scorer(s) with {pool.cpus:g} CPU and {pool.gpus:g} GPU each"),
        (
            "calibration",
            f"{scored['rows'] / seconds:,.1f} rows/s, {scored['tokens'] / seconds:,.0f} tokens/s with one scorer",
        ),
        ("scoring", duration(good_rows * seconds / scored["rows"] / pool.size)),
    ]
    if needs.generated:
        made = measured(min(GENERATED, len(examples)), partial(_generation_worker, spec), session.engines)
        todo = min(manifest.rows, spec.generate_rows or manifest.rows) * share
        took = todo * made["seconds"] / made["rows"] / session.engines.size
        lines.append(
            ("generation", f"{todo:,.0f} responses, at most {duration(took)} (measured {made['rows']:.0f} at a time)")
        )
    if spec.influence and spec.influence.fit_rows:
        rows, passes = spec.influence.fit_rows, spec.influence.passes
        took = rows * passes * seconds / scored["rows"] / pool.size
        lines.append(("curvature", f"{passes} pass(es) over {rows:,} rows, {duration(took)} or less, and the solve"))
    sizes = {"the largest concept": max((c.vectors.nbytes for c in concepts), default=0)}
    sizes["the largest test vector"] = int(scored["bytes"])
    what, largest = max(sizes.items(), key=lambda kv: kv[1])
    lines += [
        ("bytes written", f"about {written / 1e6:,.1f} MB of scores, and the rows that are kept"),
        ("broadcast", f"{largest / 1e6:,.2f} MB, {what}"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _flops(spec: PlanSpec, needs: Needs, rendered: Sequence[Rendered], deepest: int | None) -> float:
    """FLOPs a row."""
    if not needs.model:
        return 0.0
    model = spec.reader.model
    cost = cost_of(model)
    lengths = [r.stop for r in rendered]
    loss_tokens = sum(r.end - r.start for r in rendered) if needs.gradients else 0
    total = cost.flops(lengths, deepest, loss_tokens)
    if needs.gradients:
        total += cost.gradient_flops(lengths, min(needs.gradients), loss_tokens)
    if needs.generated:
        total += cost.flops(lengths, max(needs.generated))
    return total / len(rendered)


def duration(seconds: float) -> str:
    """In words, for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
