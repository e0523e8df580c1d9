"""Behaviours: the differentiable scalars f that influence is measured on, and their gradients (METHODS §1).

In: queries as tokens, concepts, a model and its tracked layers. Out: ∇f [out, in] of every tracked layer, averaged
over the queries. Knows no curvature and no file.

    loss              f = −L(positive)                      the model is better at the answer
    contrast          f = L(negative) − L(positive)         … than at the answer without the behaviour
    concept           f = P(positive)                       the activations lie more along v
    concept_contrast  f = P(positive) − P(negative)         … than those of the answer without it
    latent            f = R(positive)                       the latent of an SAE is more active
    latent_contrast   f = R(positive) − R(negative)         … than in the answer without the behaviour

L is the mean (or sum) of the cross-entropies of the response tokens with their end of turn, [start, end). P pools the
residual stream h_t of one layer over the response tokens [start, stop), v being of length 1:

    response_mean      v·a, with a = mean_t h_t
    cosine             v·a/‖a‖
    softmax            Σ_t w_t p_t, with p_t = v·h_t and w = softmax(p/temperature): near the largest p_t; the gradient
                       goes through the weights too
    last_prompt_token  v·h_{start−1}: what the model is about to do, whatever the answer says

R is the mean of a latent's activation over the response tokens, its encoder being that of the SAE. (Its decoder row is
a concept like any other.) A latent that is active on none of them has a gradient of zero.

Whatever two answers to one prompt share (topic, syntax) cancels in a contrast. Every f grows with the behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from curate.concepts.concept import Concept, direction
from curate.concepts.sae import Latent, activations, check_width
from curate.corpus.render import Rendered
from curate.curvature.fisher import Reduction
from curate.curvature.queries import Query
from curate.errors import ConfigError, CurvatureError, near
from curate.models.batching import collate
from curate.models.linear_tap import LinearTap
from curate.models.response_loss import summed_response_loss
from curate.models.tap import width
from curate.models.tracked import TrackedLayer

Kind = Literal["concept", "loss", "contrast", "concept_contrast", "latent", "latent_contrast"]
Pooling = Literal["response_mean", "last_prompt_token", "cosine", "softmax"]
Gradients = dict[str, dict[str, Tensor]]
"""By behaviour name and layer name: ∇f [out, in] on the CPU, float32 (float64 of a float64 model)."""


@dataclass(frozen=True)
class BehaviourSpec:
    """What to measure. `pooling`, `layer` (as in `hidden_states`; None: the concept's recommended one) and
    `temperature` are of concepts. `whole`: all tokens up to the end of the response count, not the response alone.

    Raises:
        ConfigError: on construction, for an unknown word, or settings that contradict each other.
    """

    kind: Kind = "concept"
    pooling: Pooling = "response_mean"
    layer: int | None = None
    whole: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"the kind of a behaviour is {self.kind!r}{near(self.kind, get_args(Kind))}")
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"the pooling of a behaviour is {self.pooling!r}{near(self.pooling, get_args(Pooling))}")
        if self.of_latent and (self.pooling != "response_mean" or self.layer is not None):
            raise ConfigError(
                f"the behaviour {self.kind!r} is a mean at its SAE's layer: it takes no pooling and no layer"
            )
        if not self.of_concept and (self.pooling != "response_mean" or self.layer is not None):
            raise ConfigError(f"the behaviour {self.kind!r} reads no activations: it takes no pooling and no layer")
        if self.pooling == "last_prompt_token" and self.whole:
            raise ConfigError("pooling last_prompt_token reads one token; it cannot be had with whole=true")
        if self.pooling == "last_prompt_token" and self.contrasts:
            raise ConfigError(
                "pooling last_prompt_token reads what comes before the answer, which is the same for both answers of a "
                "contrast; choose the kind 'concept', or another pooling"
            )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"the temperature of softmax pooling is {self.temperature}; it must be above 0")

    @property
    def of_concept(self) -> bool:
        """Whether a concept is read: its direction, or the activation of the latent that it stands for."""
        return self.kind in ("concept", "concept_contrast") or self.of_latent

    @property
    def of_latent(self) -> bool:
        """Whether a latent's activation is read."""
        return self.kind in ("latent", "latent_contrast")

    @property
    def contrasts(self) -> bool:
        """Whether queries need a negative answer."""
        return self.kind in ("contrast", "concept_contrast", "latent_contrast")


@dataclass(frozen=True, eq=False)
class Behaviour:
    """f, ready to be differentiated. `name` is that of its score columns after the method's ("loss", "contrast",
    "<concept>.L16", "<concept>.L16.cosine", "<concept>.contrast.L16", "<SAE>-<latent>.latent.L16"); `top` the layer
    that is read, None: the last. `direction` is of concepts, `latent` of latents."""

    name: str
    spec: BehaviourSpec
    top: int | None
    direction: Float[Tensor, " d"] | None
    reduction: Reduction
    latent: Latent | None = None

    def sides(self, query: Query) -> list[tuple[Rendered, float]]:
        """The conversations that f reads, each with its sign: f = Σ sign · (P or −L).

        Raises:
            CurvatureError: a contrast over a query without a negative answer; no prompt token to read.
        """
        if self.spec.contrasts and query.negative is None:
            raise CurvatureError(
                f"query {query.id!r} has no negative answer, which the behaviour {self.name!r} contrasts with; give "
                f"pairs, or choose the kind {self.spec.kind.removesuffix('contrast').rstrip('_') or 'loss'!r}"
            )
        sides = [(query.positive, 1.0)]
        if self.spec.contrasts and query.negative is not None:
            sides.append((query.negative, -1.0))
        if self.spec.pooling == "last_prompt_token" and any(r.start == 0 for r, _ in sides):
            raise CurvatureError(f"query {query.id!r} has no token before the response for pooling last_prompt_token")
        if not self.spec.of_concept and any(r.end <= max(r.start, 1) for r, _ in sides):
            raise CurvatureError(f"query {query.id!r} has no response token that the model predicts")
        return sides

    def objective(
        self, model: PreTrainedModel, sides: Sequence[tuple[Rendered, float]], input_ids: Int[Tensor, "batch tokens"]
    ) -> Callable[[Float[Tensor, "batch tokens d"]], Float[Tensor, ""]]:
        """f as a function of the hidden states of layer `top`, one row a side, padded on the right."""

        def f(hidden: Tensor) -> Tensor:
            # Pooled in float32 whatever the model's precision.
            terms = []
            for i, (rendered, sign) in enumerate(sides):
                if self.spec.of_concept:
                    states = hidden[i].to(torch.promote_types(hidden.dtype, torch.float32))
                    terms.append(sign * self._pooled(states, rendered))
                else:
                    terms.append(-sign * self._loss(model, hidden[i : i + 1], input_ids[i : i + 1], rendered))
            return torch.stack(terms).sum()

        return f

    def _pooled(self, hidden: Float[Tensor, "tokens d"], rendered: Rendered) -> Float[Tensor, ""]:
        if self.latent is not None:
            sae = self.latent.sae.to(hidden.device, hidden.dtype)
            states = hidden[0 if self.spec.whole else rendered.start : rendered.stop]
            return activations(sae, states, [self.latent.index]).mean()
        assert self.direction is not None  # of every other behaviour of a concept
        v = self.direction.to(hidden)
        if self.spec.pooling == "last_prompt_token":
            return hidden[rendered.start - 1] @ v
        states = hidden[0 if self.spec.whole else rendered.start : rendered.stop]
        if self.spec.pooling == "softmax":
            p = states @ v
            return torch.softmax(p / self.spec.temperature, 0) @ p
        mean = states.mean(0)
        return mean @ v if self.spec.pooling == "response_mean" else mean @ v / torch.linalg.vector_norm(mean)

    def _loss(self, model: PreTrainedModel, last: Tensor, ids: Tensor, rendered: Rendered) -> Float[Tensor, ""]:
        start = 1 if self.spec.whole else max(rendered.start, 1)
        total = summed_response_loss(model, last, ids, [start], [rendered.end])
        return total / (rendered.end - start) if self.reduction == "mean" else total


def make_behaviour(
    spec: BehaviourSpec, concept: Concept | None = None, reduction: Reduction = "mean", latent: Latent | None = None
) -> Behaviour:
    """
    Args:
        concept: of the kinds that read one. reduction: L is the mean or the sum over tokens, as for the examples.
        latent: what the concept stands for, of the kinds that read a latent (`latent_file.latents_of`).

    Raises:
        ConfigError: a concept or latent is missing, or given where none is read. ConceptError: the concept has no
            direction at the layer.
    """
    if spec.of_latent != (latent is not None):
        raise ConfigError(f"the behaviour {spec.kind!r} " + ("needs a latent" if spec.of_latent else "has no latent"))
    if spec.of_concept != (concept is not None):
        raise ConfigError(
            f"the behaviour {spec.kind!r} " + ("needs a concept" if spec.of_concept else "has no concept")
        )
    if reduction not in get_args(Reduction):
        raise ConfigError(f"the reduction of the loss is {reduction!r}{near(reduction, get_args(Reduction))}")
    suffix = ["whole"] if spec.whole else []
    if concept is None:
        return Behaviour(".".join([spec.kind, *suffix]), spec, None, None, reduction)
    if latent is not None:
        name = ".".join([concept.name, spec.kind, f"L{latent.sae.layer}", *suffix])
        return Behaviour(name, spec, latent.sae.layer, None, reduction, latent)
    v = torch.from_numpy(direction(concept, spec.layer))
    layer = concept.layer if spec.layer is None else spec.layer
    pooling = [] if spec.pooling == "response_mean" else [spec.pooling]
    parts = [concept.name, *(["contrast"] if spec.contrasts else []), f"L{layer}", *pooling, *suffix]
    return Behaviour(".".join(parts), spec, layer, v, reduction)


def query_gradients(
    model: PreTrainedModel,
    layers: Sequence[TrackedLayer],
    behaviours: Sequence[Behaviour],
    queries: Sequence[Query],
    pad_id: int,
) -> Gradients:
    """∇f of every behaviour, the mean over `queries`, for the tracked layers that lie below what it reads.

    One forward and one backward a query and behaviour; the two sides of a contrast share them. Each query's gradient
    is added layer by layer to the mean as the backward reaches it, so that one gradient a behaviour is in memory.

    Raises:
        CurvatureError: no query; a query that a behaviour cannot use or whose gradient is not finite (named); a
            gradient of zero (the behaviour is named).
        ConfigError: a behaviour reads a layer below which nothing is tracked, or two behaviours have one name.
        ModelError: there is no such layer.
    """
    if not queries:
        raise CurvatureError("there is no query to take gradients of")
    names = [b.name for b in behaviours]
    if len(set(names)) != len(names):
        raise ConfigError(f"two behaviours have one name: {', '.join(sorted(names))}")
    for behaviour in behaviours:  # said before the first forward
        for query in queries:
            behaviour.sides(query)
    return {b.name: _mean_gradient(model, layers, b, queries, pad_id) for b in behaviours}


def _mean_gradient(
    model: PreTrainedModel, layers: Sequence[TrackedLayer], behaviour: Behaviour, queries: Sequence[Query], pad_id: int
) -> dict[str, Tensor]:
    if behaviour.latent is not None:
        check_width(behaviour.latent.sae, width(model))
    if behaviour.direction is not None and len(behaviour.direction) != width(model):
        raise CurvatureError(
            f"the behaviour {behaviour.name!r} has a direction of width {len(behaviour.direction)}, the model one of "
            f"{width(model)}: the concept was made from another model"
        )
    try:
        tap = LinearTap(model, layers, behaviour.top)
    except ConfigError as e:
        raise ConfigError(f"{behaviour.name}: {e}") from None
    mean: dict[str, Tensor] = {}
    finite: list[Tensor] = []  # one mark a layer; read once a query, so that a device is not waited for each time

    def add(layer: TrackedLayer, a: Tensor, delta: Tensor) -> None:
        dtype = torch.promote_types(delta.dtype, torch.float32)
        a, delta = a.to(dtype).flatten(0, 1), delta.to(dtype).flatten(0, 1)
        finite.append(torch.isfinite(delta).all() & torch.isfinite(a).all())
        if layer.name not in mean:
            mean[layer.name] = torch.zeros((layer.out, layer.width), dtype=dtype, device=delta.device)
        mean[layer.name].addmm_(delta.T, a, alpha=1 / len(queries))

    for query in queries:
        sides = behaviour.sides(query)
        ids, _ = collate([r.input_ids for r, _ in sides], pad_id, device=model.device)
        value = tap.backward(ids, behaviour.objective(model, sides, ids), add)
        if not bool(torch.stack([torch.isfinite(value), *finite]).all()):
            raise CurvatureError(
                f"the gradient of {behaviour.name!r} at query {query.id!r} is not finite (its value is "
                f"{float(value):.4g}); run the model in float32, or leave the query out"
            )
        finite.clear()
    _check(behaviour.name, mean)
    return {layer.name: mean[layer.name].cpu() for layer in tap.layers if layer.name in mean}


def _check(name: str, gradient: Mapping[str, Tensor]) -> None:
    if not any(bool(block.any()) for block in gradient.values()):
        raise CurvatureError(
            f"the gradient of {name!r} is zero in all of the {len(gradient)} tracked layers: no example can score. Its "
            f"queries cancel, its latent is active on none of them, or nothing that is tracked reaches what it reads"
        )
    for layer, block in gradient.items():
        if not bool(torch.isfinite(block).all()):
            raise CurvatureError(f"the gradient of {name!r} is too large for {block.dtype} in the layer {layer!r}")
