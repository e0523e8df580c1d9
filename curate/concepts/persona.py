"""Persona vectors: v_l = mean(positive) - mean(negative) of response-mean activations, at every layer.

In: a Trait and a function from Examples to activations; for (b) also rollouts with a judge's scores. Out: a Concept
with its held-out layer profile. Knows no model, engine or judge: `rollout_requests` says what to generate,
`with_scores` attaches what a judge said.

(a) `teacher_forced`: from the trait's contrastive responses, no generation. (b) `from_rollouts`: from the model's own
answers under positive and negative system instructions, kept where a judge agrees (the method of the persona-vector
paper; METHODS: trait >= 50 for the positive and < 50 for the negative answer, coherence >= 50 for both).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from curate.concepts.concept import Concept
from curate.concepts.layer_profile import group_folds, layer_profile, recommend
from curate.concepts.trait import Trait
from curate.corpus.example import Example, Message, content_id
from curate.errors import ConceptError, ConfigError

Polarity = Literal["positive", "negative"]
ActivationsFn = Callable[[Sequence[Example]], Float[np.ndarray, "n rows d"]]
"""Response-mean activations [n, L+1, d] of n examples, in order. An example that cannot be used (over-long, say) gives
a row of NaN; a layer that is not computed is NaN in all of them."""


@dataclass(frozen=True)
class RolloutRequest:
    """One answer to generate. `messages` are the turns before it; `id` is unique and seeds the sampling."""

    id: str
    messages: tuple[Message, ...]
    polarity: Polarity
    question: int
    instruction: int
    sample: int

    def example(self, response: str = "", with_instruction: bool = True) -> Example:
        """The request and its answer as an Example (an empty answer for rendering the prompt alone)."""
        turns = self.messages if with_instruction else tuple(m for m in self.messages if m.role != "system")
        return Example(self.id, 0, (*turns, Message("assistant", response)), label=self.polarity)


@dataclass(frozen=True)
class Rollout:
    """A generated answer with a judge's scores 0-100; None = not scored (no judge, a refusal, no number)."""

    request: RolloutRequest
    response: str
    trait: float | None = None
    coherence: float | None = None


def mean_difference(
    positive: Float[np.ndarray, "n rows d"], negative: Float[np.ndarray, "m rows d"]
) -> Float[np.ndarray, "rows d"]:
    """v_l = mean_i positive[i, l] - mean_j negative[j, l], summed in float64, returned as float32.

    Raises:
        ConceptError: an empty side, or sides of different layers or width.
    """
    if positive.ndim != 3 or negative.ndim != 3 or positive.shape[1:] != negative.shape[1:]:
        raise ConceptError(f"activations of the shapes {positive.shape} and {negative.shape} cannot be compared")
    if not len(positive) or not len(negative):
        raise ConceptError(f"{len(positive)} positive and {len(negative)} negative examples: both sides need one")
    difference = positive.mean(axis=0, dtype=np.float64) - negative.mean(axis=0, dtype=np.float64)
    return difference.astype(np.float32)


def teacher_forced(
    trait: Trait,
    activations_fn: ActivationsFn,
    model: Mapping[str, Any],
    with_instruction: bool = False,
    folds: int = 5,
) -> Concept:
    """(a) The persona vector of the trait's contrastive responses to its extract questions.

    Args:
        model: identity of the model behind `activations_fn`. with_instruction: put the matching system instruction
            before each question (pair i takes instruction i mod their number); by default there is none.
        folds: question folds of the layer profile.

    Raises:
        ConfigError: the trait has no contrastive responses (or no instructions, if wanted).
        ConceptError: fewer than two usable pairs, or equal activations.
    """
    if not trait.contrastive_responses:
        raise ConfigError(
            f"trait {trait.name!r} has no contrastive_responses; add some, or make the vector from rollouts "
            f"(method=rollouts)"
        )
    if with_instruction and not trait.instructions:
        raise ConfigError(f"trait {trait.name!r} has no instructions; set with_instruction=false")
    sides: dict[str, list[Example]] = {"positive": [], "negative": []}
    for i, pair in enumerate(trait.contrastive_responses):
        for side, examples in sides.items():
            turns = [Message("user", trait.extract_questions[pair.question]), Message("assistant", getattr(pair, side))]
            if with_instruction:
                chosen = trait.instructions[i % len(trait.instructions)]
                turns.insert(0, Message("system", getattr(chosen, side)))
            examples.append(Example(content_id(turns), i, tuple(turns), label=side))
    questions = [pair.question for pair in trait.contrastive_responses]
    meta = {"with_instruction": with_instruction, "pairs": len(questions)}
    return _from_pairs(trait, sides["positive"], sides["negative"], questions, activations_fn, model, "teacher_forced",
                       meta, folds)  # fmt: skip


def rollout_requests(
    trait: Trait, n_rollouts: int = 10, which: Literal["extract", "evaluate"] = "extract"
) -> list[RolloutRequest]:
    """The answers to generate: `n_rollouts` for each question, instruction and polarity, in that order.

    Raises:
        ConfigError: no instructions, no such questions, or n_rollouts < 1.
    """
    if n_rollouts < 1:
        raise ConfigError(f"n_rollouts is {n_rollouts}; it must be at least 1")
    if not trait.instructions:
        raise ConfigError(f"trait {trait.name!r} has no instructions; rollouts need pairs of system instructions")
    sides: tuple[Polarity, ...] = ("positive", "negative")
    return [
        RolloutRequest(
            id=f"{trait.name}-{which}-q{q}-i{i}-{polarity}-{sample}",
            messages=(Message("system", getattr(instruction, polarity)), Message("user", question)),
            polarity=polarity,
            question=q,
            instruction=i,
            sample=sample,
        )
        for q, question in enumerate(trait.questions(which))
        for i, instruction in enumerate(trait.instructions)
        for polarity in sides
        for sample in range(n_rollouts)
    ]


def with_scores(
    rollouts: Sequence[Rollout], trait: Sequence[float | None], coherence: Sequence[float | None]
) -> list[Rollout]:
    """The rollouts with a judge's values, given in the same order."""
    return [replace(rollout, trait=t, coherence=c) for rollout, t, c in zip(rollouts, trait, coherence, strict=True)]


def from_rollouts(
    trait: Trait,
    rollouts: Sequence[Rollout],
    activations_fn: ActivationsFn,
    model: Mapping[str, Any],
    trait_threshold: float = 50.0,
    coherence_threshold: float = 50.0,
    judged: bool = True,
    with_instruction: bool = True,
    folds: int = 5,
) -> Concept:
    """(b) The persona vector of the model's own answers.

    A positive and a negative rollout of the same question, instruction and sample make a pair. It is kept when the
    positive answer scores >= trait_threshold, the negative one < trait_threshold, and both are coherent
    (>= coherence_threshold); an answer without a score never passes.

    Args:
        judged: False keeps every pair whatever its scores (no judge was asked).
        with_instruction: activations are read with the system instruction in the prompt, as in the paper.

    Raises:
        ConceptError: two rollouts for one request, or fewer than two pairs left; the message says what was dropped.
    """
    by_key: dict[tuple[int, int, int], dict[str, Rollout]] = {}
    for r in rollouts:
        pair = by_key.setdefault((r.request.question, r.request.instruction, r.request.sample), {})
        if r.request.polarity in pair:
            raise ConceptError(f"two rollouts for the request {r.request.id!r}; give one for each")
        pair[r.request.polarity] = r
    dropped: Counter[str] = Counter()
    kept: list[tuple[Rollout, Rollout]] = []
    for key in sorted(by_key):
        reason = _why_not(by_key[key], trait_threshold, coherence_threshold, judged)
        if reason:
            dropped[reason] += 1
        else:
            kept.append((by_key[key]["positive"], by_key[key]["negative"]))
    if len(kept) < 2:
        reasons = ", ".join(f"{n} × {why}" for why, n in dropped.most_common()) or "there were none"
        raise ConceptError(
            f"trait {trait.name!r}: {len(kept)} of {len(by_key)} pairs of rollouts can be used, at least 2 are needed. "
            f"Dropped: {reasons}. Generate more, lower the thresholds, or use contrastive responses "
            f"(method=teacher_forced)."
        )
    positive = [p.request.example(p.response, with_instruction) for p, _ in kept]
    negative = [n.request.example(n.response, with_instruction) for _, n in kept]
    meta = {
        "with_instruction": with_instruction,
        "judged": judged,
        "trait_threshold": trait_threshold if judged else None,
        "coherence_threshold": coherence_threshold if judged else None,
        "pairs": len(by_key),
        "dropped": dict(sorted(dropped.items())),
    }
    questions = [p.request.question for p, _ in kept]
    return _from_pairs(trait, positive, negative, questions, activations_fn, model, "rollouts", meta, folds)


def _why_not(pair: Mapping[str, Rollout], trait_threshold: float, coherence: float, judged: bool) -> str | None:
    """Why a pair is not used, or None."""
    if len(pair) < 2:
        return "partner missing"
    if not all(r.response.strip() for r in pair.values()):
        return "empty answer"
    if not judged:
        return None
    scores = [s for r in pair.values() for s in (r.trait, r.coherence)]
    if any(s is None for s in scores):
        return "not scored"
    positive, negative = pair["positive"], pair["negative"]
    if (positive.coherence or 0.0) < coherence or (negative.coherence or 0.0) < coherence:
        return f"coherence below {coherence:g}"
    if (positive.trait or 0.0) < trait_threshold:
        return f"positive answer below {trait_threshold:g}"
    if (negative.trait or 0.0) >= trait_threshold:
        return f"negative answer not below {trait_threshold:g}"
    return None


def _from_pairs(
    trait: Trait,
    positive: list[Example],
    negative: list[Example],
    questions: Sequence[int],
    activations_fn: ActivationsFn,
    model: Mapping[str, Any],
    method: str,
    meta: Mapping[str, Any],
    folds: int,
) -> Concept:
    n = len(positive)
    acts = np.asarray(activations_fn([*positive, *negative]))
    if acts.ndim != 3 or len(acts) != 2 * n:
        raise ConceptError(f"activations have the shape {acts.shape}, expected [{2 * n}, layers + 1, width]")
    finite = np.isfinite(acts).all(axis=2)
    defined = finite.any(axis=0)  # layers that were computed at all
    whole = finite[:, defined].all(axis=1)
    use = np.flatnonzero(whole[:n] & whole[n:]) if defined.any() else np.array([], dtype=np.int64)
    if len(use) < 2:
        raise ConceptError(
            f"trait {trait.name!r}: {len(use)} of {n} pairs have finite activations on both sides; at least 2 are "
            f"needed"
        )
    if len(use) < n:
        acts = acts[np.concatenate([use, n + use])]
    labels = np.arange(2 * len(use)) < len(use)
    vectors = mean_difference(acts[: len(use)], acts[len(use) :])
    vectors[~defined] = np.nan
    if not np.nan_to_num(vectors).any():
        raise ConceptError(
            f"trait {trait.name!r}: positive and negative answers have equal activations at every layer, so there is "
            f"no direction between them"
        )
    asked = [questions[i] for i in use]
    profile = layer_profile(acts, labels, group_folds([*asked, *asked], folds), vectors, _mean_difference_layer)
    layer, why = recommend(profile)
    return Concept(
        name=trait.name,
        vectors=vectors,
        layer=layer,
        model=dict(model),
        method=f"persona.{method}",
        pooling="response_mean",
        meta={
            **meta,
            "trait_digest": trait.digest,
            "description": trait.description,
            "pairs_used": len(use),
            "pairs_without_activations": n - len(use),
            "questions_used": len(set(asked)),
            "folds": folds,
            "profile": profile,
            "recommended_because": why,
        },
    )


def _mean_difference_layer(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return x[labels].mean(axis=0) - x[~labels].mean(axis=0)
