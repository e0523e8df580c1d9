"""The score stage: units in, score parts out, by a pool of actors that share one forward pass among all scorers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from curate.concepts.concept import Concept
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import Part, unit_name
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest
from curate.models.load import ModelSpec, load_model
from curate.models.peak import device_peak
from curate.runtime.events import about
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.session import Session
from curate.runtime.stage import StageResult, committed, run_units
from curate.runtime.stream import fetch, put
from curate.runtime.test_vectors import from_store, load_arrays
from curate.scoring.base import Needs
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass


@dataclass(frozen=True)
class ScoreSpec:
    """What the actors of a score stage need. `scorers` is {method: settings}, as in conf/scorer/.

    Token budgets are padded tokens of a batch; that of gradients None: the same.
    `tuned` is the model that gradient methods differentiate, and `test_vectors` where theirs lie, by method.
    """

    reader: ReaderSpec
    scorers: Mapping[str, Mapping[str, Any]]
    output: Output
    token_budget: int
    gradient_token_budget: int | None = None
    tuned: ModelSpec | None = None
    test_vectors: Mapping[str, str] = field(default_factory=dict)


def load_models(
    needs: Needs, base: ModelSpec, tuned: ModelSpec | None
) -> tuple[PreTrainedModel | None, PreTrainedModel | None]:
    """The models that `needs` asks for: the base model and the one to differentiate; one model in memory if equal."""
    one = load_model(base) if needs.base else None
    if not needs.tuned:
        return one, None
    if tuned in (None, base):
        one = one or load_model(base)
        return one, one
    return one, load_model(tuned or base)


class ScoreWorker:
    """One actor: a model on its device, all scorers prepared, a chunk in, a committed part out."""

    def __init__(self, spec: ScoreSpec, concepts: Any, vectors: Any, threads: int, peak_tflops: float | None) -> None:
        torch.set_num_threads(max(1, threads))
        self.spec = spec
        self.scorers = make_scorers(spec.scorers, fetch(concepts), test_vectors=from_store(fetch(vectors)))
        needs = Needs.union(s.needs() for s in self.scorers)
        model, tuned = load_models(needs, spec.reader.model, spec.tuned)
        budget, gradients = spec.token_budget, spec.gradient_token_budget
        self.shared = SharedPass(model, self.scorers, budget, tuned=tuned, gradient_tokens=gradients)
        used = tuned if model is None else model
        self.peak = None if used is None else device_peak(used.device, used.dtype, peak_tflops)
        self.columns = self.shared.columns()
        # Methods that read the base model's own response leave a gap where none was generated; others never may.
        self.partial = {c for s in self.scorers if s.needs().generated for c in s.columns()}

    def __call__(self, item: bytes) -> bytes:
        began = time.perf_counter()
        chunk = Chunk.from_bytes(item)
        with about(unit_name(chunk.key, chunk.start, chunk.stop)):
            return self._score(chunk, began)

    def _score(self, chunk: Chunk, began: float) -> bytes:
        own = [o[1] if o else None for o in chunk.own]
        found = self.shared.run(chunk.examples, chunk.rendered, own)
        scores = found.columns
        bad = list(chunk.bad)
        good = np.ones(len(chunk.examples), dtype=bool)
        for i, e in enumerate(chunk.examples):
            wrong = [c for c in self.columns if not math.isfinite(scores[c][i]) and self._unexpected(c, chunk, i)]
            if wrong:
                good[i] = False
                text = e.messages[-1].content[:200]
                bad.append(Quarantined(e.row, f"the score {wrong[0]} is {scores[wrong[0]][i]}", e.id, text))
        self.spec.output.commit(Part(chunk.key, chunk.start, chunk.stop), self._table(chunk, scores, good), bad)
        return committed(chunk, bad, found.stats.tokens, began, found.stats.flops, self.peak)

    def _unexpected(self, column: str, chunk: Chunk, i: int) -> bool:
        return column not in self.partial or chunk.own[i] is not None

    def _table(self, chunk: Chunk, scores: Mapping[str, np.ndarray], good: np.ndarray) -> pa.Table:
        keep = np.flatnonzero(good)
        examples = [chunk.examples[i] for i in keep]
        tokens = [chunk.rendered[i] for i in keep]
        base = {
            "id": pa.array([e.id for e in examples], pa.string()),
            "row": pa.array([e.row for e in examples], pa.int64()),
            "label": pa.array([e.label for e in examples], pa.string()),
            "group": pa.array([e.group for e in examples], pa.string()),
            "prompt_tokens": pa.array([r.start for r in tokens], pa.int32()),
            "response_tokens": pa.array([r.stop - r.start for r in tokens], pa.int32()),
        }
        own = {c: pa.array(np.asarray(scores[c], dtype=np.float64)[keep], from_pandas=True) for c in self.columns}
        return pa.table({**base, **own})


def score(
    spec: ScoreSpec,
    recipe: Recipe,
    manifest: Manifest,
    concepts: Sequence[Concept],
    session: Session,
    max_bad_fraction: float,
) -> StageResult:
    """Score every row of `manifest` that has no part yet.

    Raises:
        RecipeError: the output holds scores of another recipe.
        CorpusError: more than `max_bad_fraction` of the rows are bad; parts and quarantine stay for inspection.
    """
    refs = put(list(concepts)), put(load_arrays(spec.test_vectors))  # kept here while actors may be replaced
    make = partial(ScoreWorker, spec, *refs, max(1, round(session.scorers.cpus)), session.peak_tflops)
    read = partial(read_chunks, spec=spec.reader)
    return run_units(
        "score", spec.output, recipe, manifest, make, session.scorers, read, session.readers, max_bad_fraction
    )
