"""On-policy queries: the finetuned model answers a trait's questions, a judge scores the answers, the best are kept.

All answers with their scores are kept in the store, one JSON line each, so that another number of queries, or pairs
for a contrast, are chosen from them without generating again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from connectors import storage
from curate.concepts.trait import Trait
from curate.corpus.example import Example, Message, Prompt
from curate.corpus.recipe import Recipe
from curate.corpus.render import tokenizer_digest
from curate.curvature.queries import Candidate
from curate.errors import ConfigError
from curate.evaluation.judge import Judge, check_ready, reads_template, summary
from curate.models.engines import GenerationSpec
from curate.models.load import ModelSpec, load_tokenizer
from curate.runtime.answers import answers
from curate.runtime.events import say
from curate.runtime.generate import sampling_facts
from curate.runtime.judge import loaded
from curate.runtime.session import Session


@dataclass(frozen=True)
class OnPolicySpec:
    """`model`, `identity`: of the finetuned model, its adapter in it. `samples`: answers to each question."""

    trait: Trait
    questions: Literal["extract", "evaluate"]
    samples: int
    coherence_threshold: float
    model: ModelSpec
    identity: Mapping[str, Any]
    generation: GenerationSpec
    max_tokens: int


def on_policy(spec: OnPolicySpec, judge: Judge | None, store: str, session: Session) -> list[Candidate]:
    """Answers with the judge's score of the trait; None for those that are not coherent, or that it did not score.

    Raises:
        ConfigError: no judge, no questions, no judge's prompt in the trait, or `samples` < 1.
    """
    trait = spec.trait
    if judge is None:
        raise ConfigError("on-policy queries are chosen by a judge; name one (judge=openai), or set query=trait")
    if spec.samples < 1:
        raise ConfigError(f"query.samples is {spec.samples}; it must be at least 1")
    if not trait.judge_prompt:
        raise ConfigError(f"trait {trait.name!r} has no judge_prompt, so no answer can be scored; add one")
    fields = {
        "trait": trait.digest,
        "questions": spec.questions,
        "samples": spec.samples,
        "model": dict(spec.identity),
        "tokenizer": tokenizer_digest(load_tokenizer(spec.model)),
        "generation": sampling_facts(spec.generation),
        "judge": judge.fingerprint(),
        "max_tokens": spec.max_tokens,
    }
    recipe = Recipe("queries.on_policy", fields)
    where = storage.join(store, "queries", f"{trait.name}-{recipe.digest}.jsonl")
    if storage.exists(where):
        say(f"queries: found at {where}")
    else:
        storage.check_writable(storage.join(store, "queries"))  # before the work, not after
        check_ready(judge)
        rows = _answered(spec, judge, session)
        storage.write_atomic(where, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        say(f"queries: {len(rows)} answers made, judged and kept at {where}")
    rows = [json.loads(line) for line in storage.read_text(where).split("\n") if line]
    return [_candidate(row, i, spec.coherence_threshold) for i, row in enumerate(rows)]


def _answered(spec: OnPolicySpec, judge: Judge, session: Session) -> list[dict[str, Any]]:
    trait = spec.trait
    asked = [
        (f"{trait.name}-{spec.questions}-q{q}-{k}", question)
        for q, question in enumerate(trait.questions(spec.questions))
        for k in range(spec.samples)
    ]
    prompts = [Prompt(name, (Message("user", question),)) for name, question in asked]
    what = f"queries of {trait.name}"
    texts = answers(prompts, spec.model, spec.max_tokens, spec.generation, session, what)
    whole = [(name, question, text) for (name, question), text in zip(asked, texts, strict=True) if text.strip()]
    pairs = [(question, text) for _, question, text in whole]
    coherence: list[float | None] = [None] * len(pairs)
    with loaded(judge):
        found = judge.score(pairs, trait.judge_prompt)
        if trait.coherence_prompt and reads_template(judge):
            coherence = [s.value for s in judge.score(pairs, trait.coherence_prompt)]
    say(f"judge on {trait.name}: {summary(found)}")
    scores = [s.value for s in found]
    return [
        {"id": name, "prompt": question, "response": text, "trait": score, "coherence": c}
        for (name, question, text), score, c in zip(whole, scores, coherence, strict=True)
    ]


def _candidate(row: Mapping[str, Any], i: int, threshold: float) -> Candidate:
    example = Example(row["id"], i, (Message("user", row["prompt"]), Message("assistant", row["response"])))
    coherent = row["coherence"] is None or row["coherence"] >= threshold
    return Candidate(example, row["trait"] if coherent else None)
