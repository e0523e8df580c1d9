"""Evaluations: every model × evaluator, each recorded as it ends, so that a killed run goes on with what is missing.

In: one base model and the adapters to put on it (or other whole models), evaluators, a judge. Out: measures with
intervals. What a model said is kept apart from what it is worth (see evaluation_files): another judge asks no model
again, and a judge that failed costs no answers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from connectors import storage
from curate import __version__
from curate.concepts import sae_files
from curate.concepts.sae import check_fits as check_sae_fits
from curate.concepts.sae import digest as sae_digest
from curate.corpus.recipe import Recipe
from curate.corpus.render import tokenizer_digest
from curate.errors import ConfigError
from curate.evaluation.base import Evaluator, Measure, summarise
from curate.evaluation.judge import Judge, check_ready
from curate.models.adapter import CONFIG, check_fits
from curate.models.digest import folder_digest
from curate.models.engines import GenerationSpec
from curate.models.load import ModelSpec, bare_model, identity, load_tokenizer
from curate.models.locate import locate
from curate.runtime.evaluation_files import (
    MEASURES,
    load_answers,
    load_items,
    load_likelihoods,
    load_measures,
    save_items,
    save_measures,
)
from curate.runtime.events import say
from curate.runtime.generate import sampling_facts
from curate.runtime.judge import loaded
from curate.runtime.responses import Asking, Case, respond
from curate.runtime.run_note import StageNote, begin
from curate.runtime.session import Session

__all__ = ["EvaluateSpec", "EvaluatedModel", "Evaluation", "evaluate", "load_items"]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to ask, under the name `key`: the base model with the PEFT adapter at the URL `adapter`, or (None) as it
    is. `model`: another whole model in the base model's place (a full fine-tune). `sae`: URL of an SAE that is spliced
    into it. Where any model has one, all are asked by the transformers engine: answers of two engines do not compare.
    """

    key: str
    adapter: str | None = None
    model: ModelSpec | None = None
    sae: str | None = None


@dataclass(frozen=True)
class EvaluateSpec:
    """`model`: the base; its own adapter, where it has one, is merged. `generation`: engine and precision; how answers
    are sampled each evaluator says. `max_tokens`: the longest prompt, or prompt and candidate. `store`: where
    responses and evaluations are kept."""

    model: ModelSpec
    generation: GenerationSpec
    max_tokens: int
    store: str
    accelerator: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found of a model. `url`: folder of its items, see `load_items`."""

    model: str
    evaluator: str
    measures: dict[str, Measure]
    url: str


@dataclass(frozen=True)
class _Job:
    """One model × evaluator."""

    key: str
    model: ModelSpec
    case: Case
    url: str
    recipe: Recipe

    @property
    def evaluator(self) -> Evaluator:
        return self.case.evaluator


def evaluate(
    spec: EvaluateSpec,
    models: Sequence[EvaluatedModel],
    evaluators: Mapping[str, Evaluator],
    judge: Judge | None,
    session: Session,
) -> list[Evaluation]:
    """An Evaluation for every model × evaluator (by label), in their order; models of one identity are asked once.

    Raises:
        ConfigError: no model, two of one key, an evaluator without the judge that it needs, or one of whose questions
            none can be put to the model.
        ModelError: a model cannot be loaded, or an adapter belongs to another one; before anything is asked.
    """
    check_judge(evaluators, judge)
    if any(m.sae is not None for m in models):
        spec = replace(spec, generation=replace(spec.generation, engine="transformers"))
    jobs = _jobs(spec, models, evaluators, judge)
    missing = {job.url: job for job in reversed(jobs) if load_measures(job.url) is None}
    todo = [job for job in jobs if missing.get(job.url) is job]
    distinct = len({job.url for job in jobs})
    if len(missing) < distinct:
        say("evaluate: resuming", evaluations_done=distinct - len(missing), evaluations_left=len(missing))
    if todo:
        storage.check_writable(storage.join(spec.store, "evaluations"))  # before the work, not after
    if any(job.evaluator.judged for job in todo):
        check_ready(judge)
    places = {f"{job.key} · {job.case.label}": job.url for job in jobs}
    begin(StageNote("evaluate", distinct, "evaluations", distinct - len(missing), places=places, marker=MEASURES))
    judged = []
    for model in dict.fromkeys(job.model for job in todo):
        mine = {id(job.case): job for job in todo if job.model == model}
        cases = [job.case for job in mine.values()]
        for case in respond(cases, Asking(model, spec.generation, spec.max_tokens, spec.accelerator), session):
            job = mine[id(case)]
            if job.evaluator.judged:
                judged.append(job)
            else:
                _record(job, None)
    if judged:
        with loaded(judge):
            for job in judged:
                _record(job, judge)
    return [Evaluation(job.key, job.case.label, load_measures(job.url) or {}, job.url) for job in jobs]


def check_judge(evaluators: Mapping[str, Evaluator], judge: Judge | None) -> None:
    """
    Raises:
        ConfigError: an evaluator asks a judge, and there is none, or one that cannot be asked this.
    """
    for label, evaluator in evaluators.items():
        if evaluator.judged and (judge is None or judge.fingerprint().get("judge") == "none"):
            raise ConfigError(f"the evaluator {label!r} asks a judge; name one with judge=… (`curate evaluate --help`)")
        evaluator.check(judge)


def _jobs(
    spec: EvaluateSpec, models: Sequence[EvaluatedModel], evaluators: Mapping[str, Evaluator], judge: Judge | None
) -> list[_Job]:
    """All of them, their adapters checked."""
    if not models:
        raise ConfigError("there is no model to evaluate")
    twice = next((key for key, n in Counter(m.key for m in models).items() if n > 1), None)
    if twice is not None:
        raise ConfigError(f"two models to evaluate have the name {twice!r}; give each its own")
    wholes: dict[ModelSpec, _Whole] = {}
    fingerprints = {label: [e.name, e.fingerprint()] for label, e in evaluators.items()}
    asks = {label: (bool(e.prompts()), bool(e.candidates())) for label, e in evaluators.items()}
    out = []
    for m in models:
        model = spec.model if m.model is None else replace(m.model, dtype=spec.model.dtype)
        if model not in wholes:  # not setdefault: what is known of a model takes seconds to find out
            wholes[model] = _Whole(model)
        whole = wholes[model]
        worn = whole.check(m.adapter)
        inserted = {} if m.sae is None else {"sae": whole.check_sae(m.sae)}
        for label, evaluator in evaluators.items():
            generates, reads = asks[label]
            fields = {
                "code": __version__,
                "model": whole.identity,
                "worn": worn,
                "tokenizer": whole.tokenizer,
                "max_tokens": spec.max_tokens,
                "evaluator": fingerprints[label],
                "sampling": _sampling_facts(spec.generation, evaluator) if generates else None,
                "dtype": model.dtype if reads else None,
                **inserted,
            }
            said = storage.join(spec.store, "responses", Recipe("responses", fields).digest)
            asked = judge.fingerprint() if evaluator.judged and judge is not None else None
            recipe = Recipe("evaluation", {**fields, "judge": asked})
            url = storage.join(spec.store, "evaluations", recipe.digest)
            out.append(_Job(m.key, model, Case(said, label, evaluator, m.adapter, m.sae), url, recipe))
    return out


class _Whole:
    """What is known of a base model before it is loaded."""

    def __init__(self, model: ModelSpec) -> None:
        self.identity = identity(model)
        self.tokenizer = tokenizer_digest(load_tokenizer(model))
        self.bare = bare_model(model)

    def check(self, adapter: str | None) -> str | None:
        """The digest of an adapter that fits."""
        if adapter is None:
            return None
        folder = locate(adapter)
        check_fits(self.bare, folder, self.identity)
        return folder_digest(folder, CONFIG)

    def check_sae(self, url: str) -> str:
        """The digest of an SAE of the model's width and layers; whether it was made for this model is not asked."""
        found = sae_files.load(url)
        check_sae_fits(found, self.identity, allow_other_model=True)
        return sae_digest(found)


def _sampling_facts(generation: GenerationSpec, evaluator: Evaluator) -> dict[str, Any]:
    return {**sampling_facts(generation), **asdict(evaluator.sampling)}


def _record(job: _Job, judge: Judge | None) -> None:
    """Items and measures of the responses that are there."""
    began = time.monotonic()
    answers = load_answers(job.case.folder) or []
    said = {a.id: a.text for a in answers}
    texts = {p.id: said.get(p.id, "") for p in job.evaluator.prompts()}
    texts |= {p.id: said.get(p.id, "") for p in job.evaluator.follow_ups(texts)}
    items = job.evaluator.items(texts, load_likelihoods(job.case.folder) or {}, judge)
    measures = summarise(items, job.evaluator.metrics)
    save_items(job.url, items, job.evaluator.metrics)
    facts = {
        "evaluator": job.case.label,
        "metrics": [asdict(m) for m in job.evaluator.metrics],
        "answers": len(answers),
        "answer_tokens": sum(a.tokens for a in answers),
        "cut": sum(a.finish_reason == "length" for a in answers),
        "unanswered": sum(not t for t in texts.values()),
        "recipe": dict(job.recipe.fields),
    }
    save_measures(job.url, measures, facts)
    shown = ", ".join(f"{name} {m.value:.4g}" for name, m in measures.items() if m.value is not None)
    say(f"evaluate: {job.key} · {job.case.label}: {shown or 'no value'}", seconds=f"{time.monotonic() - began:.1f}")
