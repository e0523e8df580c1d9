"""Test items through the SAE, by a crew: which latents fire on their tokens, and how faithful their rankings are.

In: items with the importance of every latent, a crew whose actors hold the model and the SAE. Out: one file an item
below <store>/item_latents/<digest of the recipe>/, written by the actor that looked, so that a run that is killed goes
on with the items that are missing; and the orthogonality of the SAE's space, one JSON file. Knows no page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectors import storage
from curate.concepts.sae import SAE, encode
from curate.corpus.recipe import Recipe
from curate.corpus.spread import spread
from curate.corpus.units import Manifest
from curate.errors import ConceptError
from curate.evaluation.faithfulness import Question, faithfulness
from curate.evaluation.latent_orders import (
    FREQUENCY,
    INFLUENCE,
    MAGNITUDE,
    PAPER,
    RANDOM,
    RANDOM_ACTIVE,
    activity_orders,
    influence_orders,
)
from curate.evaluation.masking import BASE, MEASURES, MODES, Faithfulness
from curate.evaluation.orthogonality import Orthogonality, spaces
from curate.models.tap import LayerTap
from curate.runtime import partials
from curate.runtime.crew import Crew
from curate.runtime.differentiator import Differentiator
from curate.runtime.output import claim
from curate.runtime.progress import Progress
from curate.runtime.reader import ReaderSpec, read_pieces

METHODS = (INFLUENCE, PAPER, MAGNITUDE, FREQUENCY, RANDOM, RANDOM_ACTIVE)


@dataclass(frozen=True, eq=False)
class ItemJob:
    """The `number`-th item, called `name`. `importance` [h]: of each latent, positive where training helps the right
    answer. `ks`: of faithfulness; empty: it is not measured."""

    number: int
    name: str
    question: Question
    importance: NDArray[np.float64]
    ks: tuple[int, ...]
    seed: int


@dataclass(frozen=True, eq=False)
class ItemLatents:
    """An item's active latents, token by token [tokens, k] (0 in slots that are not used); `faithful` None where it was
    not measured."""

    indices: NDArray[np.int64]
    activations: NDArray[np.float32]
    faithful: Faithfulness | None


def item_latents(folder: str, recipe: Recipe, jobs: Sequence[ItemJob], crew: Crew) -> list[ItemLatents]:
    """Of every item, in order; looks at those that have no file yet.

    Raises:
        RecipeError: the folder holds another recipe's. ConfigError: see `faithfulness`. ConceptError: an item's latents
            are not finite.
    """
    claim(storage.join(folder, "recipe.json"), recipe, folder)
    urls = [storage.join(folder, f"{job.number:05d}.safetensors") for job in jobs]
    missing = [(job, url) for job, url in zip(jobs, urls, strict=True) if not storage.exists(url)]
    progress = Progress("trace: items", len(jobs), len(jobs) - len(missing), "items")
    for _ in crew.map(_look, missing):
        progress.add(1)
    progress.close()
    return [_load(url, job.ks) for job, url in zip(jobs, urls, strict=True)]


def _look(state: Differentiator, item: tuple[ItemJob, str]) -> None:
    job, url = item
    sae, rendered = _sae(state), job.question.rendered
    ids = torch.tensor([rendered.input_ids[: rendered.end]], device=state.device)
    with torch.no_grad():
        sparse = encode(sae, LayerTap(state.model, [sae.layer])(ids)[sae.layer][0])
    if not bool(torch.isfinite(sparse.values).all()):
        raise ConceptError(
            f"latents of the SAE {sae.name!r} on the test item {job.name!r} are not finite: its weights are too large "
            f"for the model's states. Train it again, or leave the item out"
        )
    tensors: dict[str, Tensor] = {"indices": sparse.indices.long(), "activations": sparse.values.float()}
    if job.ks:
        first = max(job.ks)
        orders = {
            **{name: [order] for name, order in influence_orders(job.importance, sae.latents, first).items()},
            **activity_orders(state.model, sae, [job.question], seed=job.seed, first=first, numbers=[job.number]),
        }
        found = faithfulness(state.model, sae, [job.question], orders, job.ks, state.spec.token_budget)
        tensors["base"] = torch.from_numpy(np.array([found.base[name] for name in BASE]))
        for (method, mode), by in found.values.items():
            tensors[f"{mode}/{method}"] = torch.from_numpy(np.stack([by[measure] for measure in MEASURES]))
    partials.save(url, tensors)


def _load(url: str, ks: tuple[int, ...]) -> ItemLatents:
    found = {key: tensor.numpy() for key, tensor in partials.read(url).items()}
    faithful = None
    if ks:
        values = {
            (method, mode): dict(zip(MEASURES, found[f"{mode}/{method}"], strict=True))
            for method in METHODS
            for mode in MODES
        }
        faithful = Faithfulness(ks, METHODS, values, dict(zip(BASE, found["base"], strict=True)))
    return ItemLatents(found["indices"], found["activations"], faithful)


def orthogonality(url: str, crew: Crew, manifest: Manifest, reader: ReaderSpec, rows: int) -> tuple[Orthogonality, ...]:
    """Of text embeddings, the SAE's layer and its latents, over `rows` rows spread over the corpus; found at `url`, or
    computed now and kept there."""
    if not storage.exists(url):
        (found,) = crew.map(_spaces, [(manifest, reader, rows)])
        storage.write_atomic(url, json.dumps([asdict(space) for space in found], indent=2) + "\n")
    return tuple(Orthogonality(**space) for space in json.loads(storage.read_text(url)))


def _spaces(state: Differentiator, job: tuple[Manifest, ReaderSpec, int]) -> tuple[Orthogonality, ...]:
    manifest, reader, rows = job
    rendered = [r for chunk in read_pieces(spread(manifest, rows), reader) for r in chunk.rendered]
    return spaces(state.model, _sae(state), rendered, state.spec.token_budget, state.pad_id)


def _sae(state: Differentiator) -> SAE:
    assert state.sae is not None  # of every crew that a trace starts
    return state.sae
