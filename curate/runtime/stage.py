"""What the stages that stream units have in common: the loop over answers, resume, the refusal of a mostly bad corpus.

Imports no model and no scorer: an actor that generates must not carry what scoring imports.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from connectors import storage
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest, Unit
from curate.errors import CorpusError
from curate.runtime.output import Output
from curate.runtime.progress import Progress
from curate.runtime.session import Pool, Readers
from curate.runtime.stream import stream

PART_COLUMNS = ("id", "row", "label", "group", "prompt_tokens", "response_tokens")
"""Columns of a score part that are no scores."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did now; rows done by earlier runs are in `already`."""

    rows: int
    already: int
    quarantined: int
    tokens: int
    seconds: float
    peak_worker_gb: float = 0.0


def committed(
    chunk: Chunk,
    bad: Sequence[Quarantined],
    tokens: int,
    began: float,
    flops: float = 0.0,
    peak: float | None = None,
    **more: Any,
) -> bytes:
    """What a worker says of a chunk that it has committed, for `told` of `run_units`.

    Args:
        began: time.perf_counter() when the work began.
        flops, peak: FLOPs of the model's passes, and FLOP/s that its device can do; 0 and None where none was used.
    """
    said = {
        "rows": chunk.stop - chunk.start,
        "bad": len(bad),
        "tokens": tokens,
        "flops": flops,
        "seconds": time.perf_counter() - began,
        "peak": peak,
        "rss": psutil.Process().memory_info().rss,
    }
    return json.dumps({**said, **more}).encode()


def work_items(remaining: Sequence[tuple[Unit, list[tuple[int, int]]]]) -> list[bytes]:
    """Units and the ranges to do, as items for the stream."""
    return [json.dumps({"unit": asdict(u), "ranges": r}).encode() for u, r in remaining]


def run_units(
    stage: str,
    output: Output,
    recipe: Recipe,
    manifest: Manifest,
    make_worker: Callable[[], Callable[[bytes], bytes]],
    pool: Pool,
    read: Callable[[bytes], Iterator[bytes]],
    readers: Readers,
    max_bad_fraction: float,
    told: Callable[[dict[str, Any]], None] = lambda answer: None,
) -> StageResult:
    """Stream what `output` lacks of `manifest` through readers and workers that commit it.

    Args:
        make_worker: runs in each actor's constructor, see `stream`.
        told: called with each worker's answer, see `committed`.

    Raises:
        RecipeError: the output holds another recipe's product.
        CorpusError: more than `max_bad_fraction` of the rows are bad; parts and quarantine stay for inspection.
    """
    output.open(recipe)
    remaining = output.remaining(manifest)
    chunks = [b - a for _, ranges in remaining for a, b in ranges]
    left, rows = sum(chunks), manifest.rows  # once: it is a sum over all units
    progress = Progress(stage, rows, rows - left, place=output.url, items=len(chunks))
    before = count_bad(output, manifest)
    peak = 0

    def refuse_too_many() -> None:
        if before + progress.bad > max_bad_fraction * rows:
            raise too_many_bad(output, before + progress.bad, rows, max_bad_fraction)

    refuse_too_many()
    if remaining:
        for data in stream(work_items(remaining), make_worker, pool, read, readers, len(chunks)):
            done = json.loads(data)
            progress.add(done["rows"], done["tokens"], done["bad"], done["flops"], done["seconds"], done["peak"])
            peak = max(peak, done["rss"])
            told(done)
            refuse_too_many()
    progress.close()
    output.check_whole(manifest)
    if remaining:
        storage.remove_stale_temps(output.url)  # of actors that were killed and replaced; older ones went at the start
    bad = before + progress.bad
    return StageResult(left, rows - left, bad, progress.tokens, progress.seconds, peak / 2**30)


def count_bad(output: Output, manifest: Manifest) -> int:
    """Quarantined rows of `manifest`, of this run and of earlier ones."""
    stops: dict[str, int] = {}
    for u in manifest.units:
        stops[u.key] = max(u.stop, stops.get(u.key, 0))
    return sum(q.row < stops.get(key, 0) for key, q in output.quarantined())


def too_many_bad(output: Output, bad: int, rows: int, allowed: float) -> CorpusError:
    """The error for a corpus of which too much is unusable; shows the commonest reasons."""
    reasons: dict[str, int] = {}
    for _, q in output.quarantined():
        reasons[q.reason] = reasons.get(q.reason, 0) + 1
    top = "; ".join(f"{n} × {r}" for r, n in sorted(reasons.items(), key=lambda kv: -kv[1])[:3])
    return CorpusError(
        f"{bad} of {rows} rows are bad, more than source.max_bad_fraction={allowed:g} allows: {top}. "
        f"They are listed in {output.url}/quarantine; mend the source or raise the limit and run again."
    )
