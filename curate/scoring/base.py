"""Scorer: what a scoring method says it needs, what it is given, what it returns.

In: a Batch of examples with the tensors that `needs()` asked for. Out: float64 columns, one number a row.
Every column follows one sign: higher = more of the trait (baselines too: longer, louder, more alike to the queries).
A scorer runs no model itself: `shared_pass.SharedPass` computes once what all scorers need. It knows no files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from curate.corpus.example import Example
from curate.corpus.render import Rendered

if TYPE_CHECKING:
    from curate.curvature.test_vector import TestVector, TestVectorHeader

Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Needs:
    """What a scorer must be given. Layers are numbered as `hidden_states` (0 = embeddings).

    layers: a_l, the response mean of layer l, of the row's own response.
    generated: the same of the base model's response to the row's prompt.
    gradients: ∂L/∂a_l = Σ_t ∂L/∂h_t over response tokens, L the mean cross-entropy of the response.
    derivatives: methods (their scorers' names) whose test vectors the row's loss is differentiated along.
    states: layers whose states at the response tokens are read by the scorer's `readouts`, token by token.
    tokens: the rendered row (implied by the five above).
    """

    layers: frozenset[int] = frozenset()
    generated: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()
    tokens: bool = False
    derivatives: frozenset[str] = frozenset()
    states: frozenset[int] = frozenset()

    @property
    def base(self) -> bool:
        """True if the base model must run: activations and their gradients are read from it."""
        return bool(self.layers or self.generated or self.gradients or self.states)

    @property
    def tuned(self) -> bool:
        """True if the finetuned model must run: derivatives by weights are taken in it."""
        return bool(self.derivatives)

    @property
    def model(self) -> bool:
        """True if a model must run."""
        return self.base or self.tuned

    @property
    def rendered(self) -> bool:
        """True if the rows must be tokenised."""
        return self.tokens or self.model

    @staticmethod
    def union(needs: Iterable[Needs]) -> Needs:
        """Everything that any of `needs` asks for."""
        total = Needs()
        for n in needs:
            total = Needs(
                total.layers | n.layers,
                total.generated | n.generated,
                total.gradients | n.gradients,
                total.tokens or n.tokens,
                total.derivatives | n.derivatives,
                total.states | n.states,
            )
        return total


@dataclass(frozen=True)
class Batch:
    """Rows to score, all in one order. Tensors are float32, on the scorer's device, and only those that were needed.

    pooled[l]: a_l [n, d]. generated[l]: the same for the base model's own response; NaN for a row that has none.
    gradients[l]: ∂L/∂a_l [n, d].
    derivatives[method]: -⟨s, ∇L⟩ [n, q] of the method's test vector, float64 on the host.
    readouts[name]: what the scorer's readout gave, pooled over the response tokens [n, m].
    """

    examples: Sequence[Example]
    rendered: Sequence[Rendered] | None = None
    pooled: Mapping[int, Float[Tensor, "n d"]] = field(default_factory=dict)
    generated: Mapping[int, Float[Tensor, "n d"]] = field(default_factory=dict)
    gradients: Mapping[int, Float[Tensor, "n d"]] = field(default_factory=dict)
    derivatives: Mapping[str, Float[Tensor, "n q"]] = field(default_factory=dict)
    readouts: Mapping[str, Float[Tensor, "n m"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class PassStats:
    """What a pass did: real tokens, tokens with padding, wall seconds, FLOPs of the products (padding not counted)."""

    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: PassStats) -> PassStats:
        return PassStats(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Derivative:
    """What a scorer has the losses differentiated along, and how (see directional/). On the driver a header will do."""

    vector: TestVector | TestVectorHeader
    backend: str
    reduction: str


@dataclass(frozen=True)
class Readout:
    """What a scorer reads of single tokens: `read` maps states [tokens, d] of `layer` to [tokens, columns].

    It sees response tokens of many rows at once; only the pool over each row's leaves the pass, under `name`, which is
    the scorer's own. `most`: numbers that `read` holds for a token at the same time, which bounds how many it is given.
    """

    name: str
    layer: int
    read: Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens m"]]
    columns: int
    pooling: Literal["mean", "max"] = "mean"
    most: int = 1


class Scorer(ABC):
    """One method. Keyword arguments of the constructor are the settings that a user can give (see registry.py).

    A row's score may depend on that row and the settings alone: never on its neighbours, the batch or the part.
    """

    name: str

    @abstractmethod
    def needs(self) -> Needs:
        """What `score` must be given."""

    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns, the first being the one to select by (`primary`)."""

    @abstractmethod
    def score(self, batch: Batch) -> Columns:
        """One float64 array [n] a column; NaN where a row cannot be scored."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that fix the scores, for the recipe: settings, and digests of what was read."""

    def prepare(self, device: torch.device) -> None:  # noqa: B027  (most scorers have nothing to prepare)
        """Called once in the process that scores: move vectors to `device`, load what is large."""

    def derivative(self) -> Derivative | None:
        """What `needs().derivatives` stands for; None for a method that differentiates nothing."""
        return None

    def readouts(self) -> Sequence[Readout]:
        """What `needs().states` stands for; asked after `prepare`."""
        return ()

    @property
    def primary(self) -> str:
        return self.columns()[0]


def column(method: str, concept: str | None = None, layer: int | None = None) -> str:
    """Name of a score column: ``"vector_filter.sycophantic.L15"``, ``"activation_norm.L15"``, ``"random"``."""
    return ".".join(
        [method, *([concept] if concept is not None else []), *([f"L{layer}"] if layer is not None else [])]
    )


def as_column(values: Float[Tensor, " n"]) -> NDArray[np.float64]:
    """A score tensor as a float64 array on the host."""
    return values.detach().to(device="cpu", dtype=torch.float64).numpy()
