"""Differentiator: what an actor holds between rounds of fitting: the finetuned model and its tracked layers.

The model is loaded with the first item that needs it, once; eigendecompositions go to the same device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from curate.models.load import ModelSpec, load_model, load_tokenizer, pad_id, resolve_device
from curate.models.tracked import Coverage, LayerChoice, TrackedLayer, tracked_layers
from curate.runtime.crew import Crew
from curate.runtime.session import Session

T = TypeVar("T")


@dataclass(frozen=True)
class DifferentiatorSpec:
    """The model to differentiate, which of its layers, and the padded tokens of a batch."""

    model: ModelSpec
    layers: LayerChoice
    token_budget: int


class Differentiator:
    """State of one actor of a `Crew`."""

    def __init__(self, spec: DifferentiatorSpec, threads: int) -> None:
        torch.set_num_threads(max(1, threads))
        self.spec = spec
        self._kept: tuple[str, Any] = ("", None)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What `make` made for `name`, once: the last one is kept."""
        if self._kept[0] != name:
            self._kept = (name, make())
        return self._kept[1]

    @property
    def device(self) -> torch.device:
        return resolve_device(self.spec.model.device)

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.spec.model)

    @cached_property
    def pad_id(self) -> int:
        return pad_id(load_tokenizer(self.spec.model))

    @cached_property
    def _tracked(self) -> tuple[list[TrackedLayer], Coverage]:
        return tracked_layers(self.model, self.spec.layers)

    @property
    def layers(self) -> list[TrackedLayer]:
        return self._tracked[0]

    @property
    def coverage(self) -> Coverage:
        return self._tracked[1]


@dataclass(frozen=True)
class _Make:
    spec: DifferentiatorSpec
    threads: int

    def __call__(self) -> Differentiator:
        return Differentiator(self.spec, self.threads)


def differentiators(spec: DifferentiatorSpec, session: Session) -> Crew:
    """A crew of them on the scoring pool; close it before the next stage."""
    return Crew(_Make(spec, max(1, round(session.scorers.cpus))), session.scorers)
