"""A tiny corpus, tokenised, and trainings on it as a job would run them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from curate.corpus.example import ColumnMap
from curate.models.load import ModelSpec, identity
from curate.runtime.cluster import ClusterSpec
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.reader import ReaderSpec
from curate.runtime.session import session
from curate.runtime.tokens import make_tokens
from curate.runtime.train import TrainSpec
from curate.training.spec import LoraSpec, TrainingSpec

SMALL = {
    "lora": LoraSpec(r=4, alpha=8),
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "batch_size": 8,
    "micro_batch": 4,
    "seed": 3,
    "dtype": "float32",
    "log_every": 1,
}


class Trained:
    """Everything that a training on the corpus at `corpus` needs; `max_rows` as source.max_rows."""

    def __init__(self, corpus: Path, model: Path, store: Path | str, max_rows: int | None = None) -> None:
        self.model, self.store = ModelSpec(str(model), device="cpu"), str(store)
        self.identity = identity(self.model)
        with session(ClusterSpec(address="inline", cpus=1)) as here:
            spec = SourceSpec(str(corpus), "jsonl", ColumnMap(), 25, False)
            whole, _, columns = build_manifest(spec, None)
            self.manifest = whole.head(max_rows)
            self.reader = ReaderSpec("jsonl", columns, self.model, 256, "quarantine")
            facts = {"digest": whole.digest}
            self.tokens, self.result = make_tokens(self.store, facts, self.reader, self.manifest, here, 0.1)

    def spec(self, keep: np.ndarray | None = None, **training: object) -> TrainSpec:
        settings = TrainingSpec(**{**SMALL, **training})
        return TrainSpec(self.store, settings, self.model, self.identity, self.tokens, keep)
