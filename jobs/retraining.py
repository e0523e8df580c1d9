"""The sweep with its settings: scores, arms, trainings, evaluations, page. Each is made, or found made.

Turns Settings and what the stages found into what the library takes. Holds no mathematics.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from connectors import storage
from curate import __version__
from curate.errors import ConfigError, TrainingError, near
from curate.evaluation.base import Evaluator, Measure, Metric
from curate.evaluation.ranking import ranking, spearman, top_rows
from curate.reports import retrain as page
from curate.reports import retrain_data
from curate.reports.retrain_data import ArmView, RetrainData
from curate.runtime.evaluate import EvaluatedModel, Evaluation
from curate.runtime.events import say
from curate.runtime.select import Scores, load_scores, score_columns
from curate.runtime.sweep import Outcome, check_outcomes, run_trainings, slots
from curate.runtime.train import TrainSpec, losses
from curate.training.arms import Arm, Table, make_table, ranking_columns
from jobs.evaluation import Evaluating
from jobs.influence import Influence
from jobs.training import Training

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

BASE = "base"
LOSSES = 200  # points of a loss curve on the page


@dataclass(frozen=True)
class Found:
    """What a sweep gave: trainings by key, evaluations of the models that there are."""

    outcomes: Mapping[str, Outcome]
    evaluations: Sequence[Evaluation]


class Retraining:
    """Of one run. What the stages share is computed once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.config = pipeline.config
        self.sweep = pipeline.config.sweep
        self.evaluating = Evaluating(pipeline)
        self.metrics  # noqa: B018  (raises where an evaluator or a metric of the sweep is unknown)
        self.trait, self.capability = self._metric("trait"), self._metric("capability")
        self.given = pipeline
        self.training = Training(pipeline)

    # what is measured

    @cached_property
    def evaluators(self) -> Mapping[str, Evaluator]:
        self.evaluating.check()
        return self.evaluating.evaluators

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """By "evaluator.metric"."""
        return {f"{label}.{m.name}": m for label, e in self.evaluators.items() for m in e.metrics}

    def _metric(self, sense: str) -> str | None:
        """The metric of that sense: the configured one, or the first."""
        wanted: str | None = getattr(self.sweep, sense)
        if wanted is not None:
            if wanted not in self.metrics:
                raise ConfigError(f"sweep.{sense} is {wanted!r}, which is not measured{near(wanted, self.metrics)}")
            return wanted
        first = next((key for key, m in self.metrics.items() if m.sense == sense), None)
        return next(iter(self.metrics)) if first is None and sense == "trait" else first

    # what is trained

    def spec(self, keep: np.ndarray | None, seed: int) -> TrainSpec:
        """A training of the base model on the rows of `keep` (None: all)."""
        p = self.given
        training = replace(self.training.spec, seed=seed)
        return TrainSpec(p.store, training, p.model, p.identity, self.training.tokens, keep)

    @property
    def tunes(self) -> bool:
        """True if the model that influence differentiates is to be trained here."""
        tuned = self.config.tuned
        own = tuned.path is None and tuned.adapter is None
        return bool(own and self.sweep.tuned and self.config.sink.scores is None and self.given.influence.methods)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline that scores: the given one; its influence scores differentiate the model trained on all rows,
        where they would else differentiate the base model."""
        if not self.tunes:
            return self.given
        say("sweep: training on all rows, for the influence scores to differentiate")
        (outcome,) = run_trainings({"full": self.spec(None, self.sweep.seeds[0])}, self.given.session, 1).values()
        if outcome.done is None:
            raise TrainingError(f"the model that influence differentiates could not be trained: {outcome.failed}")
        field = "adapter" if self.training.spec.method == "lora" else "path"
        found = copy.copy(self.given)
        found.config = replace(self.config, tuned=replace(self.config.tuned, **{field: outcome.done["result"]}))
        found.influence = Influence(found)
        return found

    @cached_property
    def scores(self) -> Scores:
        """The columns that rank; scores what is not scored, unless a place of scores is given (sink.scores)."""
        place = self.given.scores_place
        if self.config.sink.scores is None:
            self.pipeline.score()
        columns = score_columns(place.parts())
        if not columns:
            raise ConfigError(f"there are no scores at {place.url}; run `curate score` with this place first")
        wanted = ranking_columns(columns, self.sweep.columns)
        return load_scores(place, self.given.manifest, wanted, labels=True)

    @cached_property
    def table(self) -> Table:
        """The arms.

        Raises:
            ConfigError: see `make_table`.
        """
        table = make_table(self.scores.columns, self.sweep)
        say(
            f"sweep: {len(table.arms)} arms, {len(table.trainings)} trainings, on {table.pool_rows:,} of "
            f"{table.total:,} rows"
        )
        if (few := self._few_steps(table)) is not None:
            say(f"WARNING: {few}")
        return table

    def _few_steps(self, table: Table) -> str | None:
        """What is to be said where the smallest arms end before their learning rate has risen."""
        t = self.training.spec
        rows = min(x.rows for x in table.trainings.values()) if table.trainings else None
        steps = t.epochs * -(-rows // t.batch_size) if rows is not None else t.warmup_steps + 1
        if steps > t.warmup_steps:
            return None
        return (
            f"the smallest arms train {steps} step(s), all of them within training.warmup_steps={t.warmup_steps}: they "
            f"hardly learn. Lower training.warmup_steps or training.batch_size, or raise training.epochs."
        )

    # the stages

    def run(self) -> RetrainData:
        """Train, evaluate, write the page.

        Raises:
            TrainingError: a training failed; the page is there, without it. WorkerError: all failed.
        """
        specs = {key: self.spec(t.keep, t.seed) for key, t in self.table.trainings.items()}
        outcomes = run_trainings(specs, self.given.session, self.sweep.at_once)
        check_outcomes(outcomes)
        models = [EvaluatedModel(BASE)] if self.sweep.base else []
        models += [self._model(key, o.done["result"]) for key, o in outcomes.items() if o.done is not None]
        room = slots(self.given.session, self.training.spec.workers, self.sweep.at_once)
        data = self.data(Found(outcomes, self.evaluating.run(models, room.accelerator)))
        self.write(data)
        failed = {key: o.failed for key, o in outcomes.items() if o.failed is not None}
        if failed:
            reason = next(iter(failed.values()))
            arms = ", ".join(a.key for a in self.table.arms if a.training in failed)
            raise TrainingError(
                f"{len(failed)} of {len(outcomes)} trainings failed, those of {arms}. The first: {reason}. The others "
                f"are in {self.page}.html; the same command tries the failed ones again."
            )
        return data

    def _model(self, key: str, result: str) -> EvaluatedModel:
        if self.training.spec.method == "lora":
            return EvaluatedModel(key, adapter=result)
        return EvaluatedModel(key, model=replace(self.given.model, path=result, adapter=None, revision=None))

    @property
    def page(self) -> str:
        """Where the page, its numbers and its table lie, without suffix."""
        return storage.join(self.given.sink, "retrain")

    def write(self, data: RetrainData) -> None:
        """retrain.parquet, retrain.json and retrain.html, each at once."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(retrain_data.table(data)), sink, compression="zstd")
        storage.write_atomic(f"{self.page}.parquet", sink.getvalue().to_pybytes())
        storage.write_atomic(f"{self.page}.json", retrain_data.dumps(data))
        page.write(f"{self.page}.html", data)

    # what the page is made from

    def data(self, found: Found) -> RetrainData:
        """All numbers of the sweep."""
        measures: dict[str, dict[str, Measure]] = {}
        for e in found.evaluations:
            of_model = measures.setdefault(e.model, {})
            of_model.update({f"{e.evaluator}.{name}": m for name, m in e.measures.items()})
        columns = self.table.columns
        labels, positive = self._labels()
        inside = {c: np.where(self.table.pool, self.scores.columns[c], np.nan) for c in columns}
        known = {} if labels is None else {c: (labels[0], np.where(labels[1], inside[c], np.nan)) for c in columns}
        rankings = {c: ranking(*pair, self.config.report.bootstrap) for c, pair in known.items()}
        assert self.trait is not None
        return RetrainData(
            title=f"{self.config.report.title}: retraining",
            created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            rows=self.table.pool_rows,
            columns=columns,
            metrics=self.metrics,
            trait=self.trait,
            capability=self.capability,
            arms=tuple(self._view(a, found.outcomes, measures) for a in self.table.arms),
            spearman=retrain_data.matrix(spearman([inside[c] for c in columns])),
            scored=self.table.pool_rows,
            rankings={c: r for c, r in rankings.items() if r is not None},
            top={c: tuple(top_rows(*known[c])) for c, r in rankings.items() if r is not None},
            positive_label=positive,
            settings=self._settings(),
            notes=self._notes(found),
            recipe=self._recipe(),
        )

    def _labels(self) -> tuple[tuple[np.ndarray, np.ndarray] | None, str | None]:
        """(which rows have the positive label, which have any), where the pool holds rows of both sides."""
        positive, labels = self.config.source.positive_label, self.scores.labels
        if positive is None or labels is None:
            return None, None
        texts = np.asarray(labels.to_pylist(), dtype=object)
        hit, known = texts == positive, np.array([t is not None for t in texts])
        inside = known & self.table.pool
        if not (hit & inside).any() or not (~hit & inside).any():
            say(
                f"WARNING: the rows of the sweep are of one class: "
                f"{'none has' if not (hit & inside).any() else 'all have'} the label {positive!r} "
                f"(source.positive_label). How well the scores find it cannot be told."
            )
            return None, None
        return (hit, known), positive

    def _view(self, arm: Arm, outcomes: Mapping[str, Outcome], measures: Mapping[str, dict[str, Measure]]) -> ArmView:
        outcome = outcomes[arm.training] if arm.training is not None else None
        done = outcome.done if outcome is not None else None
        curve = losses(self._url(arm.training)) if arm.training is not None and done is not None else []
        thin = curve[:: max(1, -(-len(curve) // LOSSES))]
        return ArmView(
            name=arm.key,
            kind="method" if arm.kind == "column" else arm.kind,
            column=arm.method if arm.kind in ("column", "random") else None,
            mode=arm.mode,
            fraction=arm.fraction,
            seed=arm.seed,
            rows=arm.rows if arm.training is not None else None,
            training=arm.training,
            measures=measures.get(arm.training or BASE, {}),
            losses=tuple(thin),
            seconds=done["seconds"] if done is not None else None,
            failed=outcome.failed if outcome is not None else None,
        )

    def _url(self, training: str) -> str:
        t = self.table.trainings[training]
        return self.spec(t.keep, t.seed).url

    def _settings(self) -> tuple[tuple[str, str], ...]:
        t = self.training.spec
        what = f"LoRA r {t.lora.r}, α {t.lora.alpha:g}" if t.method == "lora" else "all weights"
        epochs = f"{t.epochs} epoch{'s' if t.epochs > 1 else ''}"
        return (
            ("model", str(self.config.model.path)),
            ("training", f"{what}, {epochs}, rate {t.learning_rate:g} ({t.schedule}), {t.batch_size} rows a step"),
            ("precision", f"{t.dtype} in training, {self.given.model.dtype} in scoring and likelihoods"),
            ("seeds", ", ".join(map(str, self.sweep.seeds))),
            ("questions", ", ".join(self.evaluators)),
        )

    def _notes(self, found: Found) -> tuple[str, ...]:
        notes = []
        left = self.table.total - self.table.pool_rows
        if left:
            notes.append(
                f"{left:,} of {self.table.total:,} rows have no score by one of the columns and are in no arm, "
                f"not in the full set either."
            )
        devices = sorted({str(o.done["device"]) for o in found.outcomes.values() if o.done is not None})
        if len(devices) > 1:
            notes.append(f"The arms were trained on unlike devices ({', '.join(devices)}), which adds a little spread.")
        if self.tunes:
            notes.append(
                f"Influence scores differentiate the model trained on all rows (seed {self.sweep.seeds[0]}); vector "
                f"methods read the base model."
            )
        if (few := self._few_steps(self.table)) is not None:
            notes.append(few[0].upper() + few[1:])
        if len(self.sweep.seeds) < 3:
            notes.append(f"{len(self.sweep.seeds)} seed(s): the spread between seeds is known only roughly.")
        return tuple(notes)

    def _recipe(self) -> dict[str, Any]:
        stored = self.given.scores_place.recipe()
        return {
            "code": __version__,
            "scores": stored.digest if stored else None,
            "model": self.given.identity,
            "training": asdict(self.training.spec),
            "sweep": asdict(self.sweep),
            "evaluators": {label: e.fingerprint() for label, e in self.evaluators.items()},
        }


def summary(data: RetrainData) -> str:
    """The sweep's main metric as text: a line a ranking and mode, a column a share of rows removed; means of seeds."""
    metric = data.metrics[data.trait]
    groups: dict[tuple[str, str], dict[float, list[float]]] = {}
    for arm in data.arms:
        value = data.value(arm, data.trait)
        if value is None:
            continue
        name = arm.column if arm.kind in ("method", "random") and arm.column else arm.kind
        mode = arm.mode if arm.kind == "method" and arm.mode else ""
        shares = groups.setdefault((name, mode), {})
        shares.setdefault(round(arm.removed or 0.0, 6), []).append(value)
    shares_of = sorted({s for found in groups.values() for s in found})
    head = ["", "mode", *(f"-{s:.0%}" if s else "0%" for s in shares_of)]
    rows = [
        [name, mode, *(f"{np.mean(found[s]):.3f}" if s in found else "" for s in shares_of)]
        for (name, mode), found in groups.items()
    ]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(r, widths, strict=True)).rstrip() for r in [head, *rows]]
    return f"{metric.title} ({data.trait}), by the share of rows removed:\n" + "\n".join(lines)
