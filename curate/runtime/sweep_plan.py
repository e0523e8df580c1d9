"""What a sweep will cost: rows, tokens, FLOPs, and time by the speed of a few measured steps.

In: a table of arms (over made-up scores where there are none yet: the numbers of rows are the same), sampled rows, the
training's settings. Out: Cost, plain numbers. A plan writes nothing but what is gone when it ends.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from curate.corpus.chunk import Chunk
from curate.corpus.render import Rendered
from curate.errors import CorpusError
from curate.evaluation.base import Evaluator
from curate.models.flops import cost_of
from curate.models.load import ModelSpec
from curate.runtime.session import Session
from curate.runtime.stream import stream
from curate.training.flops import TrainingCost
from curate.training.spec import TrainingSpec

MEASURED_STEPS = 3


@dataclass(frozen=True)
class Cost:
    """Of the trainings that are to be done. `step_rate`: tokens/s of one training, measured; `seconds` with `at_once`
    trainings side by side. `flops` of the trainings, backward passes included."""

    trainings: int
    rows: int
    tokens: float
    flops: float
    step_rate: float
    at_once: int
    seconds: float


@dataclass(frozen=True)
class Asked:
    """What an evaluator asks of one model: `prompts` to answer in at most `new_tokens` each, and `candidates` whose
    likelihood is read."""

    label: str
    prompts: int
    new_tokens: int
    candidates: int


def asked(evaluators: Mapping[str, Evaluator]) -> list[Asked]:
    """Of each evaluator; a second turn counts as much as the first where there is one."""
    found = []
    for label, e in evaluators.items():
        prompts = e.prompts()
        turns = len(prompts) + len(e.follow_ups({p.id: "" for p in prompts}))
        found.append(Asked(label, turns, e.sampling.max_new_tokens, len(e.candidates())))
    return found


def training_cost(
    model: ModelSpec,
    training: TrainingSpec,
    sampled: Sequence[Chunk],
    rows: Sequence[int],
    session: Session,
    at_once: int,
) -> Cost:
    """What trainings on so many `rows` each cost; `sampled` rows stand for all, and are trained on for a few steps.

    Raises:
        CorpusError: none of the sampled rows can be used.
    """
    rendered = [r for c in sampled for r in c.rendered]
    if not rendered:
        reasons = [b.reason for c in sampled for b in c.bad]
        raise CorpusError(f"none of the sampled rows can be used; the first reason: {reasons[0] if reasons else '–'}")
    lengths = [r.end for r in rendered]
    per_row = float(np.mean(lengths))
    cost = cost_of(model)
    of_loss = sum(r.end - max(r.start, 1) for r in rendered)
    # Of an adapter's own products, some hundredths, nothing is known here.
    weights = (cost.blocks * cost.block, cost.head) if training.method == "full" else (0.0, 0.0)
    counts = float(sum(lengths)), float(sum(n * n for n in lengths)), float(of_loss)
    flops = TrainingCost(cost, *weights).flops(*counts)
    rate = _measured(model, training, rendered, session)
    seen = training.epochs * sum(rows)
    return Cost(
        len(rows),
        sum(rows),
        seen * per_row,
        seen * flops / len(rendered),
        rate,
        at_once,
        seen * per_row / rate / max(1, min(at_once, len(rows))),
    )


def _measured(model: ModelSpec, training: TrainingSpec, rendered: Sequence[Rendered], session: Session) -> float:
    """Tokens/s of one process, with a share of the machine as a training has it."""
    share = training.batch_size // training.workers
    wanted = (MEASURED_STEPS + 1) * share
    some = [rendered[i % len(rendered)] for i in range(wanted)]
    short = replace(training, batch_size=share, workers=1, epochs=1, log_every=1, save_every=10 * wanted)
    item = json.dumps([[list(r.input_ids[: r.end]), r.start] for r in some]).encode()
    pool = replace(session.scorers, size=1)
    threads = max(1, round(pool.cpus))
    (answer,) = stream([item], partial(_stepper, model, short, threads), pool)
    return float(json.loads(answer)) * training.workers


def _stepper(model: ModelSpec, training: TrainingSpec, threads: int) -> Callable[[bytes], bytes]:
    return partial(_steps, model, training, threads)


def _steps(model: ModelSpec, training: TrainingSpec, threads: int, item: bytes) -> bytes:
    import pyarrow as pa
    from datasets import Dataset

    from curate.training.finetune import finetune
    from curate.training.log import read_log
    from curate.training.rows import TOKENS

    torch.set_num_threads(threads)
    rows = json.loads(item)
    table = pa.table({"input_ids": pa.array([ids for ids, _ in rows], TOKENS), "start": [start for _, start in rows]})
    with tempfile.TemporaryDirectory(prefix="curate-plan-") as folder:
        path = str(Path(folder) / "training")
        finetune(training, model, Dataset(table), path)
        lines = read_log(path)
    # The first step pays for what is made once.
    tokens, seconds = (lines[-1][key] - lines[0][key] for key in ("tokens", "seconds"))
    return json.dumps(tokens / max(seconds, 1e-9)).encode()
