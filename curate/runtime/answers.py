"""Answers of a model to a few thousand prompts, by the pool of engines: rollouts of concepts, on-policy queries.

Kept on the driver. For the prompts of a corpus use the generation stage, which commits parts and resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

from curate.corpus.chunk import Chunk
from curate.corpus.example import Example, Message, Prompt
from curate.corpus.render import Rendered, Renderer
from curate.errors import BadRow, ConceptError
from curate.models.engines import GenerationSpec, make_engine, row_seed
from curate.models.load import ModelSpec, load_tokenizer
from curate.runtime.progress import Progress
from curate.runtime.session import Session
from curate.runtime.stream import stream


class AnswerWorker:
    """One actor: prompts in, answers out."""

    def __init__(self, model: ModelSpec, generation: GenerationSpec) -> None:
        self.engine = make_engine(model, generation)
        self.seed = generation.seed

    def __call__(self, item: bytes) -> bytes:
        chunk = Chunk.from_bytes(item)
        seeds = [row_seed(self.seed, e.id) for e in chunk.examples]
        made = self.engine.generate([r.input_ids for r in chunk.rendered], seeds)
        return json.dumps(
            [[e.row, a.text if a.error is None else ""] for e, a in zip(chunk.examples, made, strict=True)]
        ).encode()


def _worker(model: ModelSpec, generation: GenerationSpec) -> AnswerWorker:
    return AnswerWorker(model, generation)


def answers(
    prompts: Sequence[Prompt],
    model: ModelSpec,
    max_tokens: int,
    generation: GenerationSpec,
    session: Session,
    what: str,
) -> list[str]:
    """One answer a prompt, in order; empty where the engine could not answer. `what` names the work to the user.

    Raises:
        ConceptError: a prompt that cannot be rendered (over-long, say); names it.
    """
    renderer = Renderer(load_tokenizer(model), max_tokens)
    items, size = [], 4 * generation.max_batch
    for at in range(0, len(prompts), size):
        block = prompts[at : at + size]
        examples = [Example(p.id, at + i, (*p.messages, Message("assistant", "…"))) for i, p in enumerate(block)]
        rendered = []
        for p in block:
            try:
                ids = renderer.messages_ids(p.messages)
            except BadRow as bad:
                raise ConceptError(f"{what}: the prompt of {p.id} cannot be used: {bad.reason}") from None
            rendered.append(Rendered(ids, len(ids), len(ids), len(ids)))
        items.append(Chunk("", at, at + len(block), examples, rendered, [None] * len(block)).to_bytes())
    progress = Progress(what, len(prompts))
    texts: dict[int, str] = {}
    for answer in stream(items, partial(_worker, model, generation), session.engines):
        found = json.loads(answer)
        texts.update((row, text) for row, text in found)
        progress.add(len(found))
    progress.close()
    return [texts[i] for i in range(len(prompts))]
