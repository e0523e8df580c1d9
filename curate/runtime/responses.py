"""Responses of models to evaluators' questions: answers by the pool of engines, likelihoods by the pool of scorers.

In: cases, each one evaluator and one adapter (or none) of a common base model. Out: a file of answers and one of
likelihoods a case, written as each case ends. The base model is loaded once an actor and its adapters are swapped
under it; the cases of one adapter stand together, so that each is loaded once an actor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from transformers import PreTrainedModel

from curate.concepts import sae_files
from curate.concepts.sae import SAE
from curate.corpus.example import Example, Message, Prompt
from curate.corpus.render import Rendered, Renderer
from curate.errors import BadRow, ConfigError
from curate.evaluation.base import Evaluator, Likelihood
from curate.evaluation.likelihood import likelihoods
from curate.models import adapter as lora
from curate.models.adapter import Wardrobe
from curate.models.engines import Engine, GenerationSpec, make_engine, row_seed
from curate.models.load import ModelSpec, load_model, load_tokenizer, pad_id
from curate.models.locate import locate
from curate.models.splice import spliced
from curate.models.transformers_engine import TransformersEngine
from curate.runtime.accelerators import held_to
from curate.runtime.crew import Crew
from curate.runtime.evaluation_files import (
    Answer,
    load_answers,
    load_likelihoods,
    save_answers,
    save_likelihoods,
)
from curate.runtime.events import say
from curate.runtime.progress import Progress
from curate.runtime.session import Session

BLOCK_BATCHES = 16  # of likelihoods, in one call of an actor
BLOCK_FILLS = 4  # of an engine's `max_batch`, in one call


@dataclass(frozen=True)
class Case:
    """What is asked of whom. `folder`: where the responses go. `adapter`: URL; `label`: the evaluator's, for people.
    `sae`: URL of an SAE that is spliced into the model; answers then need the transformers engine."""

    folder: str
    label: str
    evaluator: Evaluator
    adapter: str | None = None
    sae: str | None = None


@dataclass(frozen=True)
class Asking:
    """How all cases are asked. `max_tokens` of a prompt, or of prompt and candidate; `accelerator`: the kind of GPU
    (Ray's name) that answers, None for any."""

    model: ModelSpec
    generation: GenerationSpec
    max_tokens: int
    accelerator: str | None = None


def respond(cases: Sequence[Case], how: Asking, session: Session) -> Iterator[Case]:
    """Make the responses that are not there; yields each case when its own are whole.

    Raises:
        ConfigError: an evaluator of whose questions not one can be put to the model.
    """
    questions = _Questions(how.model, how.max_tokens)
    scored = [c for c in cases if c.evaluator.candidates() and load_likelihoods(c.folder) is None]
    asked = [c for c in cases if c.evaluator.prompts() and load_answers(c.folder) is None]
    for case in asked:  # says what cannot be asked before anything is
        questions.prompts(case.label, case.evaluator)
    yield from (c for c in cases if c not in scored and c not in asked)
    for case in _score(scored, how, questions, session):
        if case not in asked:
            yield case
    yield from _ask(asked, how, questions, session)


class _Questions:
    """Evaluators' questions as token ids of one model, each evaluator's rendered once."""

    def __init__(self, model: ModelSpec, max_tokens: int) -> None:
        self.renderer = Renderer(load_tokenizer(model), max_tokens)
        self.candidates = cache(self._candidates)
        self.prompts = cache(self._prompts)

    def _candidates(self, label: str, evaluator: Evaluator) -> tuple[tuple[str, Rendered], ...]:
        out, bad = [], []
        asked = evaluator.candidates()
        for i, c in enumerate(asked):
            try:
                example = Example(c.id, i, (*c.messages, Message("assistant", c.response)))
                out.append((c.id, self.renderer.render(example)))
            except BadRow as e:
                bad.append(f"{c.id}: {e.reason}")
        _tell(f"{label}: candidates", bad, len(asked))
        return tuple(out)

    def _prompts(self, label: str, evaluator: Evaluator) -> tuple[tuple[str, tuple[int, ...]], ...]:
        asked = evaluator.prompts()
        out, bad = self.render(asked)
        _tell(f"{label}: prompts", bad, len(asked))
        return out

    def render(self, prompts: Sequence[Prompt]) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], list[str]]:
        """(id, ids) of the prompts that can be put to the model, and what is wrong with the others."""
        out, bad = [], []
        for p in prompts:
            try:
                out.append((p.id, tuple(self.renderer.messages_ids(p.messages))))
            except BadRow as e:
                bad.append(f"{p.id}: {e.reason}")
        return tuple(out), bad


def _tell(what: str, bad: Sequence[str], of: int) -> None:
    if bad and len(bad) == of:
        raise ConfigError(f"{what}: none of {of} can be put to the model ({bad[0]}); raise source.max_tokens")
    if bad:
        say(f"WARNING: {what}: {len(bad)} of {of} cannot be put to the model and count as unanswered ({bad[0]})")


class _Splices:
    """SAEs within a model, for a while; the last one is kept in memory."""

    def __init__(self) -> None:
        self._kept: tuple[str, SAE] | None = None

    @contextmanager
    def on(self, model: PreTrainedModel, url: str | None) -> Iterator[None]:
        """`model` computes with the reconstructions of the SAE at `url` (None: as it is)."""
        if url is None:
            yield
            return
        if self._kept is None or self._kept[0] != url:
            self._kept = url, sae_files.load(url).to(model.device)
        with spliced(model, self._kept[1]):
            yield


# likelihoods


@dataclass(frozen=True)
class _Candidates:
    case: int
    adapter: str | None
    sae: str | None
    ids: tuple[str, ...]
    rendered: tuple[Rendered, ...]


class _Reader:
    """State of an actor that reads responses."""

    def __init__(self, model: ModelSpec, token_budget: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.wardrobe = Wardrobe(load_model(model))
        self.pad_id, self.token_budget = pad_id(load_tokenizer(model)), token_budget
        self.splices = _Splices()

    def read(self, block: _Candidates) -> list[Likelihood]:
        self.wardrobe.wear(None if block.adapter is None else locate(block.adapter))
        with self.splices.on(self.wardrobe.model, block.sae):
            return likelihoods(self.wardrobe.model, block.rendered, self.token_budget, self.pad_id)


def _read(state: _Reader, block: _Candidates) -> tuple[_Candidates, list[Likelihood]]:
    return block, state.read(block)


def _score(cases: Sequence[Case], how: Asking, questions: _Questions, session: Session) -> Iterator[Case]:
    if not cases:
        return
    blocks: list[_Candidates] = []
    for at, case in enumerate(cases):
        asked = questions.candidates(case.label, case.evaluator)
        for some in _cut(asked, BLOCK_BATCHES * session.token_budget):
            ids, rendered = zip(*some, strict=True)
            blocks.append(_Candidates(at, case.adapter, case.sae, ids, rendered))
    left = [sum(b.case == at for b in blocks) for at in range(len(cases))]
    found: list[dict[str, Likelihood]] = [{} for _ in cases]
    lost = [0 for _ in cases]
    progress = Progress("likelihoods", sum(len(b.ids) for b in blocks), unit="candidates")
    make = partial(_Reader, how.model, session.token_budget, max(1, round(session.scorers.cpus)))
    with Crew(make, held_to(session.scorers, how.accelerator), how.accelerator) as crew:
        for block, values in crew.map(_read, blocks):
            # Of a model that training has driven apart: no number to compare with.
            known = {i: v for i, v in zip(block.ids, values, strict=True) if math.isfinite(v.nats)}
            lost[block.case] += len(values) - len(known)
            found[block.case].update(known)
            progress.add(len(values), sum(len(r.input_ids) for r in block.rendered))
            left[block.case] -= 1
            if not left[block.case]:
                if lost[block.case]:
                    who = cases[block.case].sae or cases[block.case].adapter or how.model.path
                    say(f"WARNING: {cases[block.case].label}: {lost[block.case]} likelihoods by {who} are not finite")
                save_likelihoods(cases[block.case].folder, found[block.case])
                yield cases[block.case]
    progress.close()


def _cut(asked: Sequence[tuple[str, Rendered]], tokens: int) -> Iterator[list[tuple[str, Rendered]]]:
    """Neighbours together, up to so many tokens."""
    block: list[tuple[str, Rendered]] = []
    size = 0
    for name, rendered in asked:
        if block and size + len(rendered.input_ids) > tokens:
            yield block
            block, size = [], 0
        block.append((name, rendered))
        size += len(rendered.input_ids)
    if block:
        yield block


# answers


@dataclass(frozen=True)
class _Prompts:
    case: int
    adapter: str | None
    sae: str | None
    sampling: GenerationSpec
    prompts: tuple[tuple[str, tuple[int, ...]], ...]


class _Answerer:
    """State of an actor that answers."""

    def __init__(self, model: ModelSpec, generation: GenerationSpec, lora_rank: int, threads: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        self.engine: Engine = make_engine(model, generation, lora_rank)
        self.splices = _Splices()

    def answer(self, block: _Prompts) -> list[Answer]:
        seeds = [row_seed(block.sampling.seed, name) for name, _ in block.prompts]
        adapter = None if block.adapter is None else locate(block.adapter)
        with self._spliced(block.sae):
            made = self.engine.generate([ids for _, ids in block.prompts], seeds, adapter, block.sampling)
        return [
            Answer(name, a.text, len(a.token_ids), a.finish_reason)
            for (name, _), a in zip(block.prompts, made, strict=True)
        ]

    def _spliced(self, sae: str | None) -> AbstractContextManager[None]:
        if sae is None:
            return nullcontext()
        if not isinstance(self.engine, TransformersEngine):
            raise ConfigError(f"an SAE is spliced in by the transformers engine, not by {self.engine.name}")
        return self.splices.on(self.engine.model, sae)

    def close(self) -> None:
        self.engine.close()


def _answer(state: _Answerer, block: _Prompts) -> tuple[_Prompts, list[Answer]]:
    return block, state.answer(block)


def _ask(cases: Sequence[Case], how: Asking, questions: _Questions, session: Session) -> Iterator[Case]:
    """Two rounds: the questions, then those that build on their answers."""
    if not cases:
        return
    ranks = [lora.rank(locate(url)) for url in {c.adapter for c in cases} if url is not None]
    pool = held_to(session.engines, how.accelerator)
    threads = max(1, round(pool.cpus))
    make = partial(_Answerer, how.model, how.generation, max(ranks, default=0), threads)
    said: list[dict[str, Answer]] = [{} for _ in cases]

    def answered(crew: Crew, what: str, prompts: Callable[[int], tuple]) -> Iterator[int]:
        """The cases whose prompts of this round are answered, as they end."""
        blocks: list[_Prompts] = []
        for at, case in enumerate(cases):
            sampling = _sampling(how.generation, case.evaluator)
            for some in _share(prompts(at), how.generation.max_batch, pool.size, len(cases)):
                blocks.append(_Prompts(at, case.adapter, case.sae, sampling, some))
        left = [sum(b.case == at for b in blocks) for at in range(len(cases))]
        progress = Progress(what, sum(len(b.prompts) for b in blocks), unit="prompts")
        for block, answers in crew.map(_answer, blocks):
            said[block.case].update((a.id, a) for a in answers)
            progress.add(len(answers), sum(a.tokens for a in answers), sum(a.finish_reason == "error" for a in answers))
            left[block.case] -= 1
            if not left[block.case]:
                yield block.case
        progress.close()

    second: dict[int, tuple[tuple[str, tuple[int, ...]], ...]] = {}
    with Crew(make, pool, how.accelerator) as crew:
        for at in answered(crew, "answers", lambda at: questions.prompts(cases[at].label, cases[at].evaluator)):
            case = cases[at]
            texts = {p.id: said[at][p.id].text if p.id in said[at] else "" for p in case.evaluator.prompts()}
            if further := case.evaluator.follow_ups(texts):
                second[at], bad = questions.render(further)
                if bad:
                    say(f"WARNING: {case.label}: {len(bad)} of {len(further)} follow-ups cannot be asked ({bad[0]})")
            if not second.get(at):
                save_answers(case.folder, list(said[at].values()))
                yield case
        if any(second.values()):
            for at in answered(crew, "follow-ups", lambda at: second.get(at, ())):
                save_answers(cases[at].folder, list(said[at].values()))
                yield cases[at]


def _sampling(generation: GenerationSpec, evaluator: Evaluator) -> GenerationSpec:
    s = evaluator.sampling
    return replace(generation, max_new_tokens=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed)


def _share(prompts: Sequence, batch: int, actors: int, cases: int) -> Iterator[tuple]:
    """Blocks that fill an engine a few times; smaller ones where there are too few cases to keep all actors busy."""
    size = BLOCK_FILLS * batch
    if cases < 2 * actors:
        size = min(size, max(1, -(-len(prompts) // actors)))
    for i in range(0, len(prompts), size):
        yield tuple(prompts[i : i + size])
