"""SAEs as products of the store: <store>/saes/<digest of the recipe>, one a layer, made once, as many at a time as the
cluster holds.

In: settings, and where the states of each layer lie (or, with a task loss, the tokenised rows and a model). Out: what
each done.json holds (see training/sae_trainer.py), recorded as each layer ends. A run that was killed goes on at the
checkpoints of the layers that were under way. Knows no evaluator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from connectors import storage
from curate import __version__
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest
from curate.models.load import ModelSpec, load_model, resolve_device
from curate.runtime.activation_store import Activations, held_out_rows
from curate.runtime.crew import Crew
from curate.runtime.events import say
from curate.runtime.output import claim, read_parts
from curate.runtime.run_note import StageNote, begin
from curate.runtime.select import file_spans
from curate.runtime.session import Session
from curate.runtime.tokens import TokenRows
from curate.runtime.train import Watch
from curate.training.activation_batches import ActivationBatches, Shard
from curate.training.rows import PART_COLUMNS, load_rows
from curate.training.sae_rows import RowSteps
from curate.training.sae_settings import SaeSettings
from curate.training.sae_trainer import DONE, SaeIdentity, Steps, StoredSteps, finished, train_sae
from curate.training.scratch import scratch

# Settings that do not change a layer's SAE.
_NO_MATTER = ("layers", "save_every", "log_every", "held_out_rows", "metric", "store_dtype")


def resolved(settings: SaeSettings, session: Session) -> SaeSettings:
    """`settings` with its precisions decided: workers on unlike machines must not mix two."""
    found = "bfloat16" if session.scorers.gpus else "float32"
    return replace(
        settings,
        dtype=found if settings.dtype == "auto" else settings.dtype,  # type: ignore[arg-type]
        store_dtype=found if settings.store_dtype == "auto" else settings.store_dtype,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Joint:
    """What a training with a task loss reads: rows as tokens, which of them to learn from (global rows), and how many
    padded tokens at once."""

    tokens: TokenRows
    keep: np.ndarray
    token_budget: int


@dataclass(frozen=True)
class SaeSpec:
    """One layer's SAE. `facts`: what the model is, for the recipe; `identity`: for the SAE's file. `shards`: the states
    of the layer, of the activations `activations`; with `joint` they are read from the model instead."""

    store: str
    settings: SaeSettings
    layer: int
    model: ModelSpec
    facts: Mapping[str, Any]
    identity: Mapping[str, Any]
    activations: str | None
    shards: tuple[Shard, ...]
    joint: Joint | None = None

    @cached_property
    def recipe(self) -> Recipe:
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _NO_MATTER}
        fields: dict[str, Any] = {
            "code": __version__,
            "layer": self.layer,
            "settings": settings,
            "states": sum(s.tokens for s in self.shards),
            "activations": self.activations,
        }
        if self.joint is not None:
            joint = {"tokens": self.joint.tokens.digest, "rows": int(self.joint.keep.sum()), "model": self.facts}
            fields["joint"] = joint
        return Recipe("sae", fields)

    @property
    def url(self) -> str:
        return storage.join(self.store, "saes", self.recipe.digest)

    @property
    def meta(self) -> SaeIdentity:
        """What stands in the SAE's file."""
        shown = {k: v for k, v in self.recipe.fields.items() if k in ("settings", "activations", "code")}
        name = f"{self.settings.name}-L{self.layer}"
        return SaeIdentity(name, self.layer, self.identity, {**shown, "recipe": self.recipe.digest})


def train_layers(specs: Sequence[SaeSpec], session: Session) -> dict[int, dict[str, Any]]:
    """What done.json holds, by layer: found, or trained now.

    Raises:
        RecipeError: a place holds the SAE of another recipe. TrainingError: see train_sae. WorkerError: an actor died
            again and again.
    """
    out = {spec.layer: done for spec in specs if (done := finished(spec.url)) is not None}
    todo = [spec for spec in specs if spec.layer not in out]
    if out and todo:
        say("sae: resuming", layers_done=len(out), layers_left=len(todo))
    for spec in todo:
        claim(storage.join(spec.url, "recipe.json"), spec.recipe, spec.url)
    if not todo:
        return out
    begin(
        StageNote("sae", len(specs), "layers", len(out), places={f"layer {s.layer}": s.url for s in specs}, marker=DONE)
    )
    make = partial(_Trainer, max(1, round(session.scorers.cpus)))
    watched = {f"layer {spec.layer}": spec.url for spec in todo}
    with Crew(make, session.scorers) as crew, Watch(lambda: dict(watched), _say_lines):
        for layer, done in crew.map(_train, todo):
            out[layer] = done
            watched.pop(f"layer {layer}")
            say(
                f"sae: layer {layer} trained",
                explained_variance=f"{done['explained_variance']:.3f}",
                l0=f"{done['l0']:.1f}",
                dead=f"{100 * done['dead']:.1f}%",
                seconds=f"{done['seconds']:.1f}",
                done=f"{len(out)}/{len(specs)}",
            )
    return dict(sorted(out.items()))


def rows_to_learn(manifest: Manifest, settings: SaeSettings) -> np.ndarray:
    """bool [rows], global rows: all but those that are held out."""
    spans = file_spans(manifest)
    keep = np.ones(max((stop for _, stop in spans.values()), default=0), dtype=bool)
    for key, (first, stop) in spans.items():
        keep[first:stop] = ~held_out_rows(key, np.arange(stop - first), settings.held_out, settings.seed)
    return keep


def make_specs(
    store: str,
    settings: SaeSettings,
    model: ModelSpec,
    facts: Mapping[str, Any],
    identity: Mapping[str, Any],
    layers: Sequence[int],
    activations: Activations | None,
    joint: Joint | None,
) -> list[SaeSpec]:
    """One a layer."""
    digest = None if activations is None else activations.digest
    shards = {} if activations is None else activations.shards
    return [
        SaeSpec(store, settings, layer, model, facts, identity, digest, shards.get(layer, ()), joint)
        for layer in layers
    ]


class _Trainer:
    """State of an actor. The model, where one is needed, is loaded once."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.models: dict[ModelSpec, PreTrainedModel] = {}

    def model(self, spec: ModelSpec) -> PreTrainedModel:
        if spec not in self.models:
            self.models = {spec: load_model(spec)}
        return self.models[spec]


def _train(state: _Trainer, spec: SaeSpec) -> tuple[int, dict[str, Any]]:
    s = spec.settings
    device = resolve_device(spec.model.device)
    if spec.joint is None:
        steps: Steps = StoredSteps(ActivationBatches(spec.shards, s.batch_tokens, s.buffer_tokens, s.epochs, s.seed))
        return spec.layer, train_sae(s, steps, spec.meta, spec.url, device)
    joint = spec.joint
    with scratch("sae-rows") as folder:
        rows = load_rows(joint.tokens.parts, joint.keep, folder, lambda urls: read_parts(urls, PART_COLUMNS))
        steps = RowSteps(state.model(spec.model), spec.layer, rows, s, joint.token_budget)
        return spec.layer, train_sae(s, steps, spec.meta, spec.url, device)


def _say_lines(lines: Mapping[str, Mapping[str, Any]]) -> None:
    """How far the trainings are that run now, in one line."""
    step, of = (sum(line[name] for line in lines.values()) for name in ("step", "of"))
    rate = sum(line["tokens"] / max(line["seconds"], 1e-9) for line in lines.values())
    shown = {name.replace(" ", "_"): f"{line['explained_variance']:.3f}" for name, line in sorted(lines.items())[:4]}
    say(f"sae: {len(lines)} under way, {step:,}/{of:,} of their steps", rate=f"{rate:.0f} tokens/s", **shown)
