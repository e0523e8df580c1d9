"""The SAE sweep with its settings: activations, one SAE a layer, what each costs where it is inserted, the choice.

Turns Settings into what the library takes. Holds no mathematics and no data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from connectors import storage
from curate import __version__
from curate.concepts.saelens import CONFIG, WEIGHTS
from curate.corpus.recipe import Recipe
from curate.evaluation.base import Evaluator
from curate.evaluation.held_out_loss import HeldOutLoss
from curate.evaluation.sae_insertion import LayerSweep, pick_metric
from curate.models.load import ModelSpec
from curate.reports.sae_layers import build
from curate.runtime.activation_store import Activations, ActivationSpec, activation_recipe, store_activations
from curate.runtime.evaluate import EvaluateSpec, check_judge
from curate.runtime.output import claim, read_recipe
from curate.runtime.sae import Joint, make_specs, resolved, rows_to_learn, train_layers
from curate.runtime.sae_layers import HeldOut, held_out, numbers, sweep_layers
from curate.runtime.tokens import make_tokens
from curate.training.sae_settings import SaeSettings
from jobs.evaluation import Evaluating

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

HELD_OUT = "held_out_rows"  # label of the loss that decides where no evaluator is chosen


class SaeTraining:
    """The sweep of one run. What its stages share is computed once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.config = pipeline.config
        self.evaluating = Evaluating(pipeline)
        self.place = storage.join(pipeline.sink, "sae")

    # what is trained on what

    @cached_property
    def settings(self) -> SaeSettings:
        return resolved(self.config.sae, self.pipeline.session)

    @cached_property
    def model(self) -> ModelSpec:
        """The model whose states are read: the finetuned one, its adapter merged."""
        return replace(self.pipeline.influence.model, merge_adapter=True)

    @property
    def identity(self) -> dict[str, Any]:
        return self.pipeline.influence.identity

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The model in recipes."""
        return {**self.identity, "dtype": self.model.dtype}

    @cached_property
    def layers(self) -> list[int]:
        return self.settings.chosen_layers(self.identity["layers"])

    @property
    def activation_spec(self) -> ActivationSpec:
        s, p = self.settings, self.pipeline
        assert s.store_dtype != "auto"
        budget = p.session.token_budget
        return ActivationSpec(
            p.reader, self.model, tuple(self.layers), s.tokens, s.store_dtype, s.held_out, s.seed, budget
        )

    # the deciding numbers

    @cached_property
    def rows(self) -> HeldOut:
        return held_out(self.pipeline.reader, self.pipeline.manifest, self.settings)

    @cached_property
    def evaluators(self) -> Mapping[str, Evaluator]:
        """The configured ones, or the loss of the held-out rows."""
        if self.config.evaluator:
            return self.evaluating.evaluators
        return {HELD_OUT: HeldOutLoss.of(self.rows.examples)}

    def check(self) -> None:
        """Whatever can be wrong before the model is loaded.

        Raises:
            ConfigError: a layer outside the model, a metric or evaluator that cannot decide, no held-out row.
            RecipeError: the sink holds another sweep's SAE.
        """
        self.layers  # noqa: B018  (raises where one does not exist)
        self.rows  # noqa: B018  (raises where none is held out)
        pick_metric(self.evaluators, self.settings.metric)
        check_judge(self.evaluators, self._judge)
        if (stored := read_recipe(self._recipe_url, self.place)) is not None:
            self.recipe.refuse_other(stored, self.place)

    @property
    def _judge(self) -> Any:
        return self.evaluating.judge if self.config.evaluator else None

    @cached_property
    def recipe(self) -> Recipe:
        """Of the sweep."""
        p = self.pipeline
        settings = {k: v for k, v in asdict(self.settings).items() if k not in ("layers", "save_every", "log_every")}
        fields = {
            "code": __version__,
            "layers": self.layers,
            "settings": settings,
            "activations": activation_recipe(self.activation_spec, p.corpus, self.facts).digest,
            "rows": p.manifest.rows,
            "evaluators": {label: [e.name, e.fingerprint()] for label, e in self.evaluators.items()},
        }
        return Recipe("sae sweep", fields)

    @property
    def _recipe_url(self) -> str:
        return storage.join(self.place, "recipe.json")

    # the work

    def run(self) -> str:
        """Train, insert, choose; writes <sink>/sae.json, sae.html and sae/; the text that is printed."""
        p, s = self.pipeline, self.settings
        storage.check_writable(self.place)
        activations, joint = self._states()
        specs = make_specs(p.store, s, self.model, self.facts, self.identity, self.layers, activations, joint)
        trained = train_layers(specs, p.session)
        sweep = sweep_layers(
            EvaluateSpec(p.model, p.sampling, self.config.source.max_tokens, p.store),
            self.model,
            {spec.layer: spec.url for spec in specs},
            trained,
            self.evaluators,
            self._judge,
            self.rows,
            s,
            self.identity["layers"],
            {"model": self.identity, "settings": asdict(s), "rows": p.manifest.rows},
            p.session,
        )
        return self._told(sweep)

    def _states(self) -> tuple[Activations | None, Joint | None]:
        p, bad = self.pipeline, self.config.source.max_bad_fraction
        if not self.settings.task:
            found, result = store_activations(
                p.store, self.activation_spec, p.corpus, self.facts, p.manifest, p.session, bad
            )
            if result is not None:
                p.timed("activations", result)
            return found, None
        rows, done = make_tokens(p.store, p.corpus, p.reader, p.manifest, p.session, bad)
        p.timed("tokens", done)
        return None, Joint(rows, rows_to_learn(p.manifest, self.settings), p.session.gradient_token_budget)

    def _told(self, sweep: LayerSweep) -> str:
        p, chosen = self.pipeline, sweep.of(sweep.chosen)
        for name in (WEIGHTS, CONFIG):
            url = storage.join(chosen.url, name)
            with storage.open_read(url) as source, storage.atomic_writer(storage.join(self.place, name)) as target:
                shutil.copyfileobj(source, target, 1 << 20)
        claim(self._recipe_url, self.recipe, self.place)
        body = json.dumps(numbers(sweep), indent=2, ensure_ascii=False, default=str)
        storage.write_atomic(storage.join(p.sink, "sae.json"), body + "\n")
        page = storage.join(p.sink, "sae.html")
        storage.write_atomic(page, build(sweep, self.config.report.title).encode())
        return f"{_table(sweep)}\n{_verdict(sweep)}\nSAE: {self.place}\nreport: {page}"


def _verdict(sweep: LayerSweep) -> str:
    found = sweep.of(sweep.chosen)
    low, high = sweep.middle
    said = (
        f"chosen: layer {sweep.chosen}, the smallest drop within the middle half {low}..{high}: {sweep.metric.title} "
        f"{_number(found.before.value)} before insertion, {_number(found.after.value)} after"
    )
    return said if sweep.best == sweep.chosen else f"{said} (of all layers tried: layer {sweep.best})"


def _table(sweep: LayerSweep) -> str:
    rows = [("layer", "drop", "95 % interval", "after", "explained", "of tokens", "active", "dead")]
    for r in sweep.layers:
        d, q = r.drop, r.quality
        interval = "–" if d.low is None else f"{_number(d.low)} to {_number(d.high)}"
        own = (f"{q.explained_variance:.3f}", f"{q.explained_tokens:.3f}", f"{q.l0:.1f}", f"{100 * q.dead:.1f} %")
        mark = "→ " if r.layer == sweep.chosen else ""
        rows.append((f"{mark}{r.layer}", _number(d.value), interval, _number(r.after.value), *own))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
