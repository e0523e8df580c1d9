"""The concept stage: persona vectors and probes, made with the cluster's models and kept in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from connectors import storage
from curate.concepts import concept as files
from curate.concepts.concept import Concept
from curate.concepts.persona import Rollout, from_rollouts, rollout_requests, teacher_forced, with_scores
from curate.concepts.probe import linear_probe
from curate.concepts.trait import Trait, load_trait
from curate.corpus.example import ColumnMap, Example, Prompt
from curate.corpus.recipe import Recipe
from curate.corpus.render import tokenizer_digest
from curate.evaluation.judge import Judge, NoJudge, check_ready, reads_template, summary
from curate.models.engines import GenerationSpec
from curate.models.load import ModelSpec, load_tokenizer
from curate.runtime.activations import response_activations
from curate.runtime.answers import answers
from curate.runtime.events import say
from curate.runtime.generate import sampling_facts
from curate.runtime.judge import loaded
from curate.runtime.labelled import labelled_rows
from curate.runtime.session import Session


@dataclass(frozen=True)
class ConceptContext:
    """What every way of making a concept needs. `store` keeps what was made, under the digest of its recipe."""

    model: ModelSpec
    identity: Mapping[str, Any]
    max_tokens: int
    store: str
    session: Session

    def activations(self, what: str) -> Callable[[Sequence[Example]], np.ndarray]:
        return lambda examples: response_activations(examples, self.model, self.max_tokens, self.session, what)

    def facts(self) -> dict[str, Any]:
        """What turns conversations into activations, for recipes."""
        return {
            "model": dict(self.identity),
            "tokenizer": tokenizer_digest(load_tokenizer(self.model)),
            "max_tokens": self.max_tokens,
        }

    def place(self, name: str, recipe: Recipe) -> str:
        return storage.join(self.store, "concepts", f"{name}-{recipe.digest}")


def _kept(context: ConceptContext, name: str, recipe: Recipe, make: Callable[[], Concept]) -> Concept:
    """The concept of `recipe` from the store, or made now and put there."""
    where = context.place(name, recipe)
    if storage.exists(where + ".json"):
        say(f"concept {name}: found at {where}.json")
        return files.load(where, name)
    storage.check_writable(storage.join(context.store, "concepts"))  # before the work, not after
    made = make()
    files.save(replace(made, name=name), where)
    say(f"concept {name}: made and kept at {where}.json", layer=made.layer)
    return files.load(where, name)


def persona(context: ConceptContext, name: str, trait_url: str, with_instruction: bool) -> Concept:
    """Persona vector from a trait file's contrastive responses."""
    trait = load_trait(trait_url)
    fields = {**context.facts(), "trait": trait.digest, "with_instruction": with_instruction}
    recipe = Recipe("concept.persona.teacher_forced", fields)

    def make() -> Concept:
        return teacher_forced(trait, context.activations(f"concept {name}"), context.identity, with_instruction)

    return _kept(context, name, recipe, make)


def persona_rollouts(
    context: ConceptContext,
    name: str,
    trait_url: str,
    rollouts: int,
    generation: GenerationSpec,
    judge: Judge | None,
    thresholds: tuple[float, float],
    with_instruction: bool,
) -> Concept:
    """Persona vector from the model's own answers under both instructions, judged unless `judge` is None.

    A judge that has only its one question is not asked for coherence: every answer counts as coherent.
    """
    trait = load_trait(trait_url)
    if judge is not None and not reads_template(judge):
        thresholds = (thresholds[0], 0.0)
    recipe = Recipe(
        "concept.persona.rollouts",
        {
            **context.facts(),
            "trait": trait.digest,
            "rollouts": rollouts,
            "generation": sampling_facts(generation),
            "judge": (judge or NoJudge()).fingerprint(),
            "thresholds": list(thresholds),
            "with_instruction": with_instruction,
        },
    )

    def make() -> Concept:
        check_ready(judge)
        answered = _generate_rollouts(context, trait, rollouts, generation)
        if judge is not None:
            answered = _judged(trait, answered, judge)
        return from_rollouts(
            trait,
            answered,
            context.activations(f"concept {name}"),
            context.identity,
            *thresholds,
            judged=judge is not None,
            with_instruction=with_instruction,
        )

    return _kept(context, name, recipe, make)


def _generate_rollouts(
    context: ConceptContext, trait: Trait, rollouts: int, generation: GenerationSpec
) -> list[Rollout]:
    requests = rollout_requests(trait, rollouts)
    prompts = [Prompt(r.id, r.messages) for r in requests]
    what = f"rollouts of {trait.name}"
    texts = answers(prompts, context.model, context.max_tokens, generation, context.session, what)
    return [Rollout(r, text) for r, text in zip(requests, texts, strict=True)]


def _judged(trait: Trait, rollouts: list[Rollout], judge: Judge) -> list[Rollout]:
    pairs = [(r.request.messages[-1].content, r.response) for r in rollouts]
    say(f"judging {len(pairs)} rollouts of {trait.name}")
    with loaded(judge):
        found = judge.score(pairs, trait.judge_prompt)
        coherent = judge.score(pairs, trait.coherence_prompt) if reads_template(judge) else None
    say(f"judge on {trait.name}: {summary(found)}")
    coherence = [0.0] * len(pairs) if coherent is None else [s.value for s in coherent]
    return with_scores(rollouts, [s.value for s in found], coherence)


def probe(
    context: ConceptContext,
    name: str,
    url: str | list[str],
    file_format: str,
    columns: ColumnMap,
    positive_label: str,
    max_rows: int,
) -> Concept:
    """Linear probe from labelled rows of any readable source; rows that cannot be used are left out and counted."""
    rows = labelled_rows(url, file_format, columns, positive_label, max_rows, f"concept {name}", "concept.probe")
    fields = {
        **context.facts(),
        "rows": rows.digests,
        "columns": columns.facts(),
        "positive_label": positive_label,
        "max_rows": max_rows,
    }

    def make() -> Concept:
        found = context.activations(f"concept {name}")(rows.examples)
        whole = np.isfinite(found).all(axis=(1, 2))
        kept = [label for label, ok in zip(rows.labels, whole, strict=True) if ok]
        return linear_probe(found[whole], kept, name, context.identity, positive_label)

    return _kept(context, name, Recipe("concept.probe", fields), make)
