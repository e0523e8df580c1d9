"""Local judges on the session's pools: models that score pairs in actors (or in this process, inline).

In: pairs on the driver, hundreds or thousands of them. Out: JudgeScores, in order, kept by content in the store so that
the same pair is read once. What a judge is (a chat model, a classifier, a probe) is in `curate.evaluation`; here is
only how its work is spread.

Every call starts the actors and ends them, so that the machine is free for the next stage. `with loaded(judge):` keeps
them from call to call; meanwhile the judge's pool has no room for others: no engine and no scorer of another model may
be waited for inside. Call from the thread that holds the session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from connectors import storage
from curate.corpus.recipe import Recipe
from curate.corpus.render import Renderer, tokenizer_digest
from curate.errors import ConfigError
from curate.evaluation.classifier_judge import ClassifierJudge, ClassifierSpec
from curate.evaluation.engine_judge import EngineJudge
from curate.evaluation.judge import Judge, JudgeScore, not_unicode
from curate.evaluation.judge_cache import SegmentCache, content_key
from curate.evaluation.probe_judge import ProbeHead, ProbeJudge, fit_head, held_out_folds
from curate.models.engines import GenerationSpec, make_engine
from curate.models.load import ModelSpec, load_tokenizer
from curate.runtime.activations import response_activations
from curate.runtime.crew import Crew
from curate.runtime.events import say
from curate.runtime.labelled import LabelledRows
from curate.runtime.progress import Progress
from curate.runtime.session import Pool, Session

Pairs = Sequence[tuple[str, str]]
Mark = Callable[[Pairs, str], list[JudgeScore]]
"""What an actor holds: pairs and a template in, scores out."""
CHUNK = 128  # pairs of one call of an actor, and of one segment of the cache
DIGITS = 8  # tokens of room behind a prompt, for blanks and digits


@dataclass(frozen=True)
class _Block:
    """Prompts of one actor call."""

    at: int
    pairs: list[tuple[str, str]]
    template: str


def _mark(mark: Mark, block: _Block) -> tuple[int, list[JudgeScore]]:
    return block.at, mark(block.pairs, block.template)


class PoolJudge:
    """See the module's docstring.

    Args:
        prepare: on the driver, when first there is something to judge: what makes an actor's state.
        facts: the judge's fingerprint.
        reads_template: False for judges that have only their one question.
        store: answers are kept below it, by fingerprint; None = not kept.
    """

    local = True

    def __init__(
        self,
        prepare: Callable[[], Callable[[], Mark]],
        pool: Pool,
        facts: Mapping[str, Any],
        reads_template: bool,
        store: str | None,
    ) -> None:
        self._prepare, self._pool, self._facts = prepare, pool, dict(facts)
        self.reads_template = reads_template
        place = storage.join(store, "judge", f"{facts['judge']}-{content_key(self._facts)}") if store else None
        self._cache = SegmentCache(place) if place else None
        self._crew: Crew | None = None
        self._held = False

    def fingerprint(self) -> dict[str, Any]:
        """See Judge."""
        return dict(self._facts)

    def score(self, pairs: Pairs, prompt_template: str) -> list[JudgeScore]:
        """One JudgeScore a pair, in order; equal pairs are read once.

        Raises:
            ConfigError: an empty template, for a judge that reads it.
            CurateError: the judge's model cannot be loaded, or actors died again and again.
        """
        if self.reads_template and not prompt_template:
            raise ConfigError("the trait has no judge prompt; add judge_prompt and coherence_prompt, or set judge=none")
        template = prompt_template if self.reads_template else ""
        keys = {(q, a): content_key({"question": q, "answer": a, "template": template}) for q, a in pairs}
        stored = self._cache.get(keys.values()) if self._cache else {}
        found = {pair: JudgeScore(**stored[key]) for pair, key in keys.items() if key in stored}
        missing = []
        for pair in keys:
            if pair in found:
                continue
            if reason := not_unicode(*pair):
                found[pair] = JudgeScore(None, reason=reason)
            else:
                missing.append(pair)
        for answered in self._ask(missing, template):
            found.update(answered)
            if self._cache:
                self._cache.put({keys[pair]: asdict(score) for pair, score in answered.items()})
        return [found[q, a] for q, a in pairs]

    def _ask(self, missing: list[tuple[str, str]], template: str) -> Iterator[dict[tuple[str, str], JudgeScore]]:
        if not missing:
            return
        # Longest first: what is begun last is short, and texts of like length share a batch.
        missing = sorted(missing, key=lambda pair: -len(pair[0]) - len(pair[1]))
        size = min(CHUNK, -(-len(missing) // self._pool.size))
        blocks = [_Block(at, missing[at : at + size], template) for at in range(0, len(missing), size)]
        progress = Progress("judge", len(missing))
        if self._crew is None:
            self._crew = Crew(self._prepare(), self._pool)
        try:
            for at, scores in self._crew.map(_mark, blocks):
                progress.add(len(scores))
                yield dict(zip(missing[at : at + size], scores, strict=True))
        finally:
            progress.close()
            if not self._held:
                self.close()

    def close(self) -> None:
        """End the actors."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Keep the actors from call to call."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.close()


def loaded(judge: Judge | None) -> AbstractContextManager[None]:
    """`with loaded(judge):` a local judge stays in memory from call to call; nothing for one that is elsewhere."""
    return judge.loaded() if isinstance(judge, PoolJudge) else nullcontext()


def is_local(judge: Judge | None) -> bool:
    """Whether the judge works on the session's pools, which must then be free of other actors."""
    return isinstance(judge, PoolJudge)


# a chat model


def engine_judge(
    model: ModelSpec, identity: Mapping[str, Any], generation: GenerationSpec, max_tokens: int, store: str | None,
    session: Session,
) -> PoolJudge:  # fmt: skip
    """A chat model on the engines' pool. `generation`: engine and precision, decided; `max_tokens`: the longest filled
    template, in the judge's tokens."""
    tokenizer = load_tokenizer(model)
    Renderer(tokenizer, max_tokens)  # says what is wrong with a base model, before the answers are made
    facts = {
        "judge": "engine",
        "model": dict(identity),
        "tokenizer": tokenizer_digest(tokenizer),
        "engine": generation.engine,
        "dtype": generation.dtype,
        "max_tokens": max_tokens,
        "form": 1,
    }
    make = partial(_engine, model, generation, max_tokens)
    return PoolJudge(lambda: make, session.engines, facts, True, store)


def _engine(model: ModelSpec, generation: GenerationSpec, max_tokens: int) -> Mark:
    return EngineJudge(make_engine(model, generation), Renderer(load_tokenizer(model), max_tokens))


# a classifier


def classifier_judge(
    spec: ClassifierSpec, identity: Mapping[str, Any], store: str | None, session: Session
) -> PoolJudge:
    """A classifier on the scorers' pool. `spec.model.dtype` is decided."""
    facts = {
        "judge": "classifier",
        "model": dict(identity),
        "tokenizer": tokenizer_digest(load_tokenizer(spec.model)),
        "label": spec.label,
        "reads": spec.reads,
        "max_tokens": spec.max_tokens,
        "dtype": spec.model.dtype,
        "form": 1,
    }
    make = partial(_classifier, spec, session.token_budget, max(1, round(session.scorers.cpus)))
    return PoolJudge(lambda: make, session.scorers, facts, False, store)


def _classifier(spec: ClassifierSpec, budget: int, threads: int) -> Mark:
    torch.set_num_threads(threads)
    return ClassifierJudge(spec, budget)


# a probe


@dataclass(frozen=True)
class ProbeSpec:
    """`model` with its precision decided, and its `identity`; `rows` with `positive` as the label on the trait's side.

    `layer`: None = the one that separates held-out rows best.
    """

    model: ModelSpec
    identity: Mapping[str, Any]
    rows: LabelledRows
    positive: str
    layer: int | None
    max_tokens: int


def probe_judge(spec: ProbeSpec, recipe: Mapping[str, Any], store: str, session: Session) -> PoolJudge:
    """A probe on the scorers' pool, fitted when it is first needed and kept in the store.

    Args:
        recipe: what `spec.rows` were read from (files, columns, how many).

    Raises:
        ConceptError: rows of one class, or too few to hold any out.
    """
    held_out_folds(spec.rows.labels, spec.positive, spec.rows.groups)  # before the answers are made
    facts = {
        "judge": "probe",
        "model": dict(spec.identity),
        "tokenizer": tokenizer_digest(load_tokenizer(spec.model)),
        "dtype": spec.model.dtype,
        "max_tokens": spec.max_tokens,
        "rows": dict(recipe),
        "positive_label": spec.positive,
        "layer": spec.layer,
        "form": 1,
    }
    place = storage.join(store, "judge", f"probe-{Recipe('judge.probe', facts).digest}.safetensors")
    threads = max(1, round(session.scorers.cpus))

    def prepare() -> Callable[[], Mark]:
        return partial(_probe, spec.model, _head(spec, place, session), spec.max_tokens, session.token_budget, threads)

    return PoolJudge(prepare, session.scorers, facts, False, store)


def _head(spec: ProbeSpec, place: str, session: Session) -> ProbeHead:
    """The fitted probe, from the store or made now."""
    if storage.exists(place):
        return ProbeHead.from_bytes(storage.read_bytes(place))
    storage.check_writable(place.rsplit("/", 1)[0])  # before the work, not after
    found = response_activations(spec.rows.examples, spec.model, spec.max_tokens, session, "judge's probe")
    whole = np.isfinite(found).all(axis=(1, 2))
    labels = [label for label, ok in zip(spec.rows.labels, whole, strict=True) if ok]
    groups = spec.rows.groups
    if groups is not None:
        groups = [g for g, ok in zip(groups, whole, strict=True) if ok]
    head = fit_head(found[whole], labels, spec.positive, groups, spec.layer)
    storage.write_atomic(place, head.to_bytes())
    held_out = "" if head.auc is None else f", held-out AUC {head.auc:.3f}"
    say(f"judge's probe: {len(labels)} rows, layer {head.layer}{held_out}; kept at {place}")
    return head


def _probe(model: ModelSpec, head: ProbeHead, max_tokens: int, budget: int, threads: int) -> Mark:
    torch.set_num_threads(threads)
    return ProbeJudge(model, head, max_tokens, budget)
