"""A training as a product of the store: <store>/trainings/<digest of its recipe>, made once, by Ray Train or inline.

In: what to train on which rows. Out: what done.json holds (see training/finetune.py). A killed training goes on from
its newest checkpoint when it is asked for again; a worker that dies is replaced and does the same. May be called from
within a Ray task, so that several run at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Bool

from connectors import storage
from curate import __version__, errors
from curate.corpus.recipe import Recipe
from curate.errors import ConfigError, CurateError, WorkerError
from curate.models.load import ModelSpec
from curate.runtime import events
from curate.runtime.inline import is_inline
from curate.runtime.output import claim, read_parts
from curate.runtime.progress import EVERY_SECONDS
from curate.runtime.session import Session
from curate.runtime.tokens import TokenRows
from curate.training.log import read_log
from curate.training.rows import PART_COLUMNS, load_rows
from curate.training.scratch import scratch
from curate.training.spec import TrainingSpec

DONE, FAILED = "done.json", "failed.json"
MAX_FAILURES = 3
# Settings that do not change what comes out, but for rounding.
_NO_MATTER = ("workers", "strategy", "micro_batch", "save_every", "log_every", "gradient_checkpointing")


def resolved(training: TrainingSpec, session: Session) -> TrainingSpec:
    """`training` with its precision decided: workers on unlike machines must not mix two."""
    if training.dtype != "auto":
        return training
    return replace(training, dtype="bfloat16" if session.scorers.gpus else "float32")


@dataclass(frozen=True)
class TrainSpec:
    """One training. `identity` is what the model is (models.load.identity); `keep` marks the rows to train on, by
    global row, None: all; `accelerator`, if given, is the kind of GPU that it must run on (Ray's name)."""

    store: str
    training: TrainingSpec
    model: ModelSpec
    identity: dict[str, Any]
    tokens: TokenRows
    keep: Bool[np.ndarray, " rows"] | None = None
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep.shape != (self.tokens.rows,):
            raise ConfigError(
                f"the mask of kept rows has the shape {self.keep.shape}, the corpus {self.tokens.rows} rows"
            )

    @cached_property
    def recipe(self) -> Recipe:
        training = asdict(self.training)
        if self.training.method == "full":
            del training["lora"]
        keep = np.ones(self.tokens.rows, bool) if self.keep is None else self.keep
        fields = {
            "code": __version__,
            "model": self.identity,
            "tokens": self.tokens.digest,
            "rows": {
                "kept": int(keep.sum()),
                "mask": hashlib.blake2b(np.packbits(keep).tobytes(), digest_size=16).hexdigest(),
            },
            "training": {name: value for name, value in training.items() if name not in _NO_MATTER},
        }
        return Recipe("training", fields)

    @property
    def url(self) -> str:
        return storage.join(self.store, "trainings", self.recipe.digest)

    @property
    def result(self) -> str:
        """Where the adapter (method lora) or the model (method full) lies once it is done."""
        return storage.join(self.url, self.training.product)


def finished(spec: TrainSpec) -> dict[str, Any] | None:
    """What done.json of this training holds, or None where it is not done."""
    where = storage.join(spec.url, DONE)
    return json.loads(storage.read_text(where)) if storage.exists(where) else None


def losses(url: str) -> list[tuple[int, float]]:
    """(step, training loss) of the training at `url`: of each line the mean since the line before."""
    return [(line["step"], line["loss"]) for line in read_log(url)]


def train(spec: TrainSpec, session: Session, told: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train, or go on, or find it done.

    Args:
        told: called every few seconds with the newest line of the log (training/log.py), from a thread of its own;
            None: nobody asks, so that the log is not read.

    Raises:
        TrainingError: no rows, or a loss that is no number. ConfigError: more workers than the cluster holds, targets
            that match nothing. WorkerError: workers died again and again.
    """
    done = finished(spec)
    if done is not None:
        return done
    claim(storage.join(spec.url, "recipe.json"), spec.recipe, spec.url)
    heard = Watch(lambda: {"": spec.url}, lambda lines: told(lines[""])) if told is not None else nullcontext()
    if is_inline():
        if spec.training.workers > 1:
            raise ConfigError(f"training.workers={spec.training.workers} needs Ray; inline runs have one process")
        with heard:
            return _work(spec, max(1, round(session.scorers.cpus)), lambda line: None, session.peak_tflops)
    storage.remove(storage.join(spec.url, FAILED))
    with heard:
        _by_ray(spec, session)
    return _outcome(spec)


def _work(
    spec: TrainSpec, threads: int, report: Callable[[dict[str, Any]], None], peak_tflops: float | None
) -> dict[str, Any]:
    """One worker's part, in its own process."""
    from curate.training.finetune import finetune  # seconds, which a driver should not pay

    torch.set_num_threads(threads)
    with scratch("rows") as folder:
        rows = load_rows(spec.tokens.parts, spec.keep, folder, lambda urls: read_parts(urls, PART_COLUMNS))
        return finetune(spec.training, spec.model, rows, spec.url, report, spec.identity, peak_tflops)


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker. An error of the user's is not cured by another try: it is written down, and
    workers that Ray Train starts in the place of these find it and end at once."""
    events.enter(config["scene"])
    spec: TrainSpec = config["spec"]
    failed = storage.join(spec.url, FAILED)
    if storage.exists(failed):
        return
    try:
        _work(spec, config["threads"], ray.train.report, config["peak_tflops"])
    except CurateError as e:
        storage.write_atomic(failed, json.dumps({"error": type(e).__name__, "message": str(e)}))
        if spec.training.workers > 1:
            raise  # the others wait for this one, and must be ended


def _by_ray(spec: TrainSpec, session: Session) -> None:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    pool, workers = session.scorers, spec.training.workers
    have = ray.cluster_resources()
    if workers * pool.cpus > have.get("CPU", 0) or workers * pool.gpus > have.get("GPU", 0):
        raise ConfigError(
            f"training.workers={workers} with {pool.cpus:g} CPUs and {pool.gpus:g} GPUs each does not fit the "
            f"cluster's {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        )
    # Workers stay in the driver's folder, where relative places mean the same.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    with scratch("ray") as notes:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "spec": spec,
                "threads": max(1, round(pool.cpus)),
                "peak_tflops": session.peak_tflops,
                "scene": events.scene(),
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(pool.gpus),
                resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {})},
                accelerator_type=spec.accelerator,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # ray.train's stubs show version 1
                name=spec.recipe.digest,
                storage_path=str(notes),  # of Ray Train's own notes; checkpoints are ours
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as e:
            _outcome(spec)
            first = str(e).strip().splitlines()
            raise WorkerError(
                f"the training at {spec.url} was ended: its workers failed {MAX_FAILURES + 1} times "
                f"({' '.join(first[:3])[:500]}). Workers' logs lie below /tmp/ray/session_latest/logs. The same "
                f"command goes on from the newest checkpoint."
            ) from e


def _outcome(spec: TrainSpec) -> dict[str, Any]:
    """What was done; or the error that a worker wrote down."""
    failed = storage.join(spec.url, FAILED)
    if storage.exists(failed):
        said = json.loads(storage.read_text(failed))
        raise getattr(errors, said["error"], CurateError)(said["message"])
    done = finished(spec)
    if done is None:
        raise WorkerError(f"the training at {spec.url} ended without a result; run the same command again")
    return done


class Watch:
    """Reads the logs of trainings that other processes write, and passes on what is new, from a thread of its own.

    `under_way` gives their URLs by name, now; `told` gets the newest line of each that has one, by name.
    """

    def __init__(
        self, under_way: Callable[[], Mapping[str, str]], told: Callable[[dict[str, dict[str, Any]]], None]
    ) -> None:
        self.under_way, self.told = under_way, told
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        last: dict[str, int] = {}
        while not self.over.wait(EVERY_SECONDS):
            logs = {name: read_log(url) for name, url in self.under_way().items()}
            lines = {name: log[-1] for name, log in logs.items() if log}
            steps = {name: line["step"] for name, line in lines.items()}
            if lines and steps != last:
                last = steps
                self.told(lines)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
