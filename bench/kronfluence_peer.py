"""kronfluence as a peer: its own covariances, eigenvectors, corrected eigenvalues and pairwise scores, on rows that are
tokenised here.

In: a model that becomes kronfluence's own (its layers are wrapped), names of layers, tokenised rows. Out: seconds of
each phase, scores. Rows are padded to the longest of a batch of like lengths, which its own examples do not do.

Conventions: L is the sum over response tokens; A counts all real tokens; eigendecompositions in float64 unless told
otherwise; damping 0.1 of each layer's mean eigenvalue. With curate's reduction="sum" and tokens="all" both estimate one
matrix, and differ in the labels that are drawn (and in the scale of B, which changes no eigenvector).
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from bench.public_recipe import batch_of
from curate.corpus.render import Rendered


class _CausalTask(Task):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        chosen = labels != -100
        logits, labels = logits[:, :-1][chosen].float(), labels[chosen]
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self._names

    def get_attention_mask(self, batch: Any) -> Tensor:
        return batch["attention_mask"]


class KronfluencePeer:
    """`seconds`: CPU seconds of "covariance", "eigen" and "correction", once fitted."""

    def __init__(self, model: Any, names: Sequence[str], empirical: bool = False, batch: int = 4) -> None:
        logging.getLogger("kronfluence").setLevel(logging.ERROR)
        task = _CausalTask(names)
        self._model = prepare_model(model, task)
        self._folder = tempfile.TemporaryDirectory(prefix="kronfluence-")
        level = logging.root.level
        self._analyzer = Analyzer(
            "peer", self._model, task, cpu=True, disable_tqdm=True, output_dir=self._folder.name,
            log_level=logging.ERROR,
        )  # fmt: skip
        logging.root.setLevel(level)  # which kronfluence sets for its own
        self._analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_collate))
        self._arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=empirical)
        self._batch = batch
        self.seconds: dict[str, float] = {}

    def fit(self, rows: Sequence[Rendered]) -> None:
        data = [batch_of(row, 0, torch.device("cpu")) for row in sorted(rows, key=lambda r: -r.end)]
        how: dict[str, Any] = {"factor_args": self._arguments}
        sized = {**how, "per_device_batch_size": self._batch}
        for phase, run in (
            ("covariance", lambda: self._analyzer.fit_covariance_matrices("f", data, **sized)),
            ("eigen", lambda: self._analyzer.perform_eigendecomposition("f", **how)),
            ("correction", lambda: self._analyzer.fit_lambda_matrices("f", data, **sized)),
        ):
            began = time.process_time()
            run()
            self.seconds[phase] = time.process_time() - began

    def scores(self, rows: Sequence[Rendered], queries: Sequence[Rendered]) -> np.ndarray:
        """⟨∇L(row), H⁻¹ Σ ∇L(queries)⟩, float64 [n], in the order of `rows`."""
        order = sorted(range(len(rows)), key=lambda i: -rows[i].end)
        cpu = torch.device("cpu")
        self._analyzer.compute_pairwise_scores(
            "s", "f",
            query_dataset=[batch_of(q, 0, cpu) for q in queries],
            train_dataset=[batch_of(rows[i], 0, cpu) for i in order],
            per_device_query_batch_size=1,
            per_device_train_batch_size=self._batch,
            score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )  # fmt: skip
        found = self._analyzer.load_pairwise_scores("s")["all_modules"].sum(0).double().numpy()
        out = np.empty(len(rows))
        out[order] = found
        return out

    def close(self) -> None:
        self._folder.cleanup()


def _collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(r["input_ids"].shape[1] for r in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat([F.pad(r[name], (0, longest - r[name].shape[1]), value=value) for r in rows])
        for name, value in fill.items()
    }
