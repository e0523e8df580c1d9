"""Response activations of a few thousand examples at every layer, by the scoring pool: what concepts are made from.

Kept in memory on the driver: [n, L+1, d] float32. For a corpus use the score stage, which keeps dot products only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from curate.corpus.chunk import Chunk
from curate.corpus.example import Example
from curate.corpus.render import Rendered, Renderer
from curate.errors import BadRow, ConceptError
from curate.models.batching import collate, token_batches
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.pooling import response_mean
from curate.models.tap import LayerTap, n_layers
from curate.runtime.events import say
from curate.runtime.progress import Progress
from curate.runtime.session import Session
from curate.runtime.stream import stream

CHUNK = 16  # small enough that a few dozen examples keep every actor busy


class ActivationWorker:
    """One actor: tokenised examples in, their response means at every layer out."""

    def __init__(self, model: ModelSpec, token_budget: int, threads: int) -> None:
        torch.set_num_threads(max(1, threads))
        self.model = load_model(model)
        self.tap = LayerTap(self.model, range(n_layers(self.model) + 1))
        self.budget = token_budget

    def __call__(self, item: bytes) -> bytes:
        chunk = Chunk.from_bytes(item)
        rows: list[np.ndarray] = [np.empty(0)] * len(chunk.rendered)
        device = self.model.device
        for batch in token_batches([len(r.input_ids) for r in chunk.rendered], self.budget):
            picked = [chunk.rendered[i] for i in batch]
            ids, _ = collate([r.input_ids for r in picked], 0)
            states = self.tap(ids.to(device))
            starts, stops = [r.start for r in picked], [r.stop for r in picked]
            pooled = torch.stack([response_mean(states[k], starts, stops) for k in self.tap.layers], dim=1)
            for i, values in zip(batch, pooled.float().cpu().numpy(), strict=True):
                rows[i] = values
        values = np.stack(rows).astype("<f4")
        return np.array([chunk.start, *values.shape], "<i8").tobytes() + values.tobytes()


def _worker(model: ModelSpec, budget: int, threads: int) -> Callable[[bytes], bytes]:
    return ActivationWorker(model, budget, threads)


def response_activations(
    examples: Sequence[Example], model: ModelSpec, max_tokens: int, session: Session, what: str = "activations"
) -> Float[np.ndarray, "n rows d"]:
    """Mean activation over each example's response at every layer, [n, L+1, d] float32.

    An example that cannot be tokenised (over-long, say) gives a row of NaN and a warning.

    Raises:
        ConceptError: no example can be used.
    """
    renderer = Renderer(load_tokenizer(model), max_tokens)
    usable: list[int] = []
    rendered: list[Rendered] = []
    for i, e in enumerate(examples):
        try:
            rendered.append(renderer.render(e))
            usable.append(i)
        except BadRow as bad:
            say(f"{what}: example {i} ({e.id}) is left out: {bad.reason}")
    if not usable:
        raise ConceptError(f"{what}: none of the {len(examples)} examples can be used; see the reasons above")
    items = []
    for at in range(0, len(usable), CHUNK):
        stop = min(at + CHUNK, len(usable))
        own: list = [None] * (stop - at)
        items.append(Chunk("", at, stop, [examples[i] for i in usable[at:stop]], rendered[at:stop], own).to_bytes())
    progress = Progress(what, len(usable))
    make = partial(_worker, model, session.token_budget, max(1, round(session.scorers.cpus)))
    out = np.empty(0)
    for answer in stream(items, make, session.scorers):
        start, *shape = np.frombuffer(answer, "<i8", count=4).tolist()
        if not out.size:
            out = np.full((len(examples), *shape[1:]), np.nan, dtype=np.float32)
        out[usable[start : start + shape[0]]] = np.frombuffer(answer, "<f4", offset=32).reshape(shape)
        progress.add(shape[0])
    progress.close()
    return out
