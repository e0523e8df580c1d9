"""From settings to evaluators, the models to ask, and a table of what was found. Holds no mathematics and no data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING

from connectors import storage
from connectors.packages import expand
from curate.errors import ConfigError
from curate.evaluation.base import Evaluator, Measure, Metric, paired
from curate.evaluation.judge import Judge
from curate.evaluation.registry import make_evaluators
from curate.runtime.evaluate import EvaluatedModel, EvaluateSpec, Evaluation, check_judge, evaluate, load_items

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

BASE, TUNED = "base", "tuned"


class Evaluating:
    """The evaluation of one run. What its users share is computed once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.config = pipeline.config

    @cached_property
    def evaluators(self) -> Mapping[str, Evaluator]:
        """By label; reads their questions.

        Raises:
            ConfigError: none, an unknown one, or settings that cannot be used.
        """
        settings = {name: dict(options or {}) for name, options in (self.config.evaluator or {}).items()}
        return make_evaluators(settings, {"seed": self.config.seed})

    @cached_property
    def judge(self) -> Judge | None:
        """The configured judge, where an evaluator asks one."""
        return self.pipeline.judge() if any(e.judged for e in self.evaluators.values()) else None

    def check(self) -> None:
        """Whatever can be wrong before a model is asked, as far as settings and questions go.

        Raises:
            ConfigError: names the setting.
        """
        check_judge(self.evaluators, self.judge)

    @cached_property
    def models(self) -> list[EvaluatedModel]:
        """Of `curate evaluate`: the base model, the tuned one, and further adapters.

        Raises:
            ConfigError: none of them.
        """
        tuned, wanted = self.config.tuned, self.config.evaluation
        found = [EvaluatedModel(BASE)] if wanted.base else []
        if tuned.path is not None:
            whole = replace(self.config.model, path=tuned.path, adapter=tuned.adapter, revision=None)
            found.append(EvaluatedModel(TUNED, model=whole))
        elif tuned.adapter is not None:
            found.append(EvaluatedModel(TUNED, adapter=expand(tuned.adapter)))
        urls = [expand(url).rstrip("/") for url in wanted.adapters]
        found += [EvaluatedModel(name, adapter=url) for name, url in zip(_names(urls), urls, strict=True)]
        if not found:
            raise ConfigError(
                "evaluation.base=false leaves no model to ask; give tuned.adapter=… or evaluation.adapters"
            )
        return found

    @property
    def spec(self) -> EvaluateSpec:
        p = self.pipeline
        return EvaluateSpec(p.model, p.sampling, self.config.source.max_tokens, p.store)

    def run(self, models: Sequence[EvaluatedModel], accelerator: str | None = None) -> list[Evaluation]:
        """Ask all `models` all that is configured, on one kind of GPU if given; what is in the store is not asked.

        Raises:
            see `curate.runtime.evaluate.evaluate`
        """
        spec = replace(self.spec, accelerator=accelerator)
        return evaluate(spec, models, self.evaluators, self.judge, self.pipeline.session)

    def report(self, found: Sequence[Evaluation]) -> str:
        """Writes <sink>/evaluation.json; the table that is printed."""
        url = storage.join(self.pipeline.sink, "evaluation.json")
        metrics = {label: {m.name: m for m in e.metrics} for label, e in self.evaluators.items()}
        differences = self._differences(found)
        body = {
            "model": self.pipeline.identity,
            "models": {m.key: m.adapter or (m.model or self.config.model).path for m in self.models},
            "metrics": {label: [asdict(m) for m in named.values()] for label, named in metrics.items()},
            "evaluations": [
                {**asdict(e), "from_base": {name: asdict(m) for name, m in differences.get(e.url, {}).items()}}
                for e in found
            ],
        }
        storage.write_atomic(url, json.dumps(body, indent=2, ensure_ascii=False) + "\n")
        return f"{_table(found, metrics, differences)}\nnumbers: {url}"

    def _differences(self, found: Sequence[Evaluation]) -> dict[str, dict[str, Measure]]:
        """By the folder of a model's evaluation: what differs from the base model's, question by question."""
        base = {e.evaluator: load_items(e.url) for e in found if e.model == BASE}
        return {
            e.url: paired(load_items(e.url), base[e.evaluator], self.evaluators[e.evaluator].metrics)
            for e in found
            if e.model != BASE and e.evaluator in base
        }


def _names(urls: Sequence[str]) -> list[str]:
    """A short name each: the folder's, or the one above where it is called adapter; the whole URL where two agree."""
    short = [url.removesuffix("/adapter").rsplit("/", 1)[-1] for url in urls]
    taken = [*short, BASE, TUNED]
    return [name if taken.count(name) == 1 else url for name, url in zip(short, urls, strict=True)]


def _table(
    found: Sequence[Evaluation],
    metrics: Mapping[str, Mapping[str, Metric]],
    differences: Mapping[str, Mapping[str, Measure]],
) -> str:
    rows = [
        ("model", "evaluator", "metric", "value", "95 % interval", "from base", "95 % interval", "items", "missing")
    ]
    for e in found:
        for name, m in e.measures.items():
            title = metrics[e.evaluator][name].title
            d = differences.get(e.url, {}).get(name)
            change = ("", "") if d is None else (_number(d.value, "+"), _interval(d, "+"))
            rows.append(
                (e.model, e.evaluator, title, _number(m.value), _interval(m), *change, str(m.n), str(m.missing))
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4g}"


def _interval(m: Measure, sign: str = "") -> str:
    return "–" if m.low is None else f"{_number(m.low, sign)} to {_number(m.high, sign)}"
