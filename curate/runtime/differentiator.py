"""Differentiator: what an actor holds between rounds of fitting: the finetuned model, its tracked layers, and the SAE
that is spliced into it, if any.

Both are loaded with the first item that needs them, once; eigendecompositions go to the same device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from curate.concepts.sae import SAE
from curate.errors import CurvatureError
from curate.models.flops import ForwardCost, model_cost
from curate.models.load import ModelSpec, load_model, load_tokenizer, pad_id, resolve_device
from curate.models.peak import device_peak
from curate.models.splice import spliced
from curate.models.tracked import Coverage, LayerChoice, TrackedLayer, tracked_layers
from curate.runtime.crew import Crew
from curate.runtime.session import Session

T = TypeVar("T")


@dataclass(frozen=True)
class DifferentiatorSpec:
    """The model to differentiate, which of its layers, and the padded tokens of a batch. `sae`: where an SAE lies whose
    reconstruction takes the place of its layer's state; the tracked layers are then those above."""

    model: ModelSpec
    layers: LayerChoice
    token_budget: int
    sae: str | None = None


class Differentiator:
    """State of one actor of a `Crew`."""

    def __init__(self, spec: DifferentiatorSpec, threads: int, peak_tflops: float | None) -> None:
        torch.set_num_threads(max(1, threads))
        self.spec, self._peak_tflops = spec, peak_tflops
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
    def cost(self) -> ForwardCost:
        """FLOPs of the model."""
        return model_cost(self.model)

    @cached_property
    def peak(self) -> float | None:
        """FLOP/s that the device can do, where that is known."""
        return device_peak(self.device, self.model.dtype, self._peak_tflops)

    @cached_property
    def pad_id(self) -> int:
        return pad_id(load_tokenizer(self.spec.model))

    @cached_property
    def sae(self) -> SAE | None:
        """On the model's device; None: the model is as it is."""
        if self.spec.sae is None:
            return None
        from curate.concepts import sae_files

        return sae_files.load(self.spec.sae).to(self.device)

    def inserted(self) -> AbstractContextManager[None]:
        """Within it, the model computes with the SAE, where there is one."""
        return nullcontext() if self.sae is None else spliced(self.model, self.sae)

    @cached_property
    def _tracked(self) -> tuple[list[TrackedLayer], Coverage]:
        layers, coverage = tracked_layers(self.model, self.spec.layers)
        if self.sae is not None and (lowest := min(layer.block for layer in layers)) < self.sae.layer:
            raise CurvatureError(
                f"the SAE {self.sae.name!r} is spliced in at layer {self.sae.layer}, but the tracked layers begin at "
                f"block {lowest}, below it; set curvature.layers.first={self.sae.layer}"
            )
        return layers, coverage

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
    peak_tflops: float | None

    def __call__(self) -> Differentiator:
        return Differentiator(self.spec, self.threads, self.peak_tflops)


def differentiators(spec: DifferentiatorSpec, session: Session) -> Crew:
    """A crew of them on the scoring pool; close it before the next stage."""
    return Crew(_Make(spec, max(1, round(session.scorers.cpus)), session.peak_tflops), session.scorers)
