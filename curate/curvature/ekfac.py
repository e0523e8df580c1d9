"""EK-FAC: K-FAC's eigenvectors, with eigenvalues corrected to the true second moments in that basis.

In: covariances, a model and examples. Out: one Factor a layer, and H⁻¹V. Knows no files.

With A = Q_A Λ_A Q_Aᵀ and B = Q_B Λ_B Q_Bᵀ, K-FAC has the eigenvalues Λ_B Λ_Aᵀ; EK-FAC replaces them by
Λ_ij = E_i[(Q_Bᵀ G_i Q_A)²_ij]. The diagonal curvature is the same with both bases the identity.
H⁻¹V = Q_B[(Q_Bᵀ V Q_A) ⊘ (Λ + λ)]Q_Aᵀ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from curate.corpus.render import Rendered
from curate.curvature.fisher import CurvatureKind, CurvatureSpec, FisherBatch, fisher_pass
from curate.curvature.sums import Sums
from curate.errors import ConfigError, CurvatureError, near
from curate.models.tracked import TrackedLayer

log = logging.getLogger(__name__)

# Elements of per-example gradients at once: 64 MiB in float32.
_GRADIENTS = 16 * 2**20


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors in columns, eigenvalues ascending and not negative, of one covariance."""

    vectors: Float[Tensor, "n n"]
    values: Float[Tensor, " n"]


def eigenbasis(matrix: Float[Tensor, "n n"], name: str) -> Eigenbasis:
    """Of a covariance, in its own precision; in float64 where the solver fails in that (a warning says so).

    Raises:
        CurvatureError: the matrix is not finite, or float64 fails as well; names the layer `name`.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise CurvatureError(f"the covariance of {name!r} is not finite; fit it again with the model in float32")
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.linalg.LinAlgError as error:
            reason = str(error).splitlines()[0]
        else:
            if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
                return Eigenbasis(vectors.to(matrix.dtype), values.to(matrix.dtype).clamp(min=0))
            reason = "its result is not finite"
        if dtype != torch.float64:
            log.warning("the eigensolver failed on %r in %s (%s); trying float64", name, dtype, reason)
    raise CurvatureError(f"the covariance of {name!r} has no eigendecomposition, in float64 either: {reason}")


@dataclass(frozen=True)
class Bases:
    """The eigenbases of the inputs by `reads`, and of the outputs by layer name."""

    inputs: Mapping[str, Eigenbasis]
    outputs: Mapping[str, Eigenbasis]


class Corrections(Sums):
    """Σ_i (Q_Bᵀ G_i Q_A)² at the layer's name [out, in], with the count "examples"."""

    def eigenvalues(self, name: str) -> Float[Tensor, "out in"]:
        """Λ of the layer `name`.

        Raises:
            CurvatureError: nothing was summed.
        """
        n = self.counts.get("examples", 0)
        if name not in self.tensors or n < 1:
            raise CurvatureError(f"there is no correction of {name!r}: no example was seen, or of other layers")
        return self.tensors[name] / n


def accumulate_corrections(
    model: PreTrainedModel,
    layers: Sequence[TrackedLayer],
    spec: CurvatureSpec,
    bases: Bases | None,
    rendered: Sequence[Rendered],
    ids: Sequence[str],
    max_tokens_batch: int,
    pad_id: int,
    into: Corrections,
) -> Corrections:
    """Add Σ_i (Q_Bᵀ G_i Q_A)² of these examples to `into`, which is returned.

    `bases=None`: both the identity, which makes the diagonal curvature. Other arguments and errors as in `fisher_pass`.
    """
    rotated: dict[str, Tensor] = {}

    def add(batch: FisherBatch, layer: TrackedLayer, a: Tensor, delta: Tensor) -> None:
        a = a.to(delta.dtype)
        if bases is not None:
            # Tokens are rotated, never gradients: G_i in the basis is Σ_t (Q_Bᵀδ_t)(Q_Aᵀa_t)ᵀ, and q, k, v share Q_Aᵀa.
            if layer.reads not in rotated:
                rotated.clear()
                rotated[layer.reads] = a @ bases.inputs[layer.reads].vectors
            a = rotated[layer.reads]
            delta = delta @ bases.outputs[layer.name].vectors
        total = into.at(layer.name, (layer.out, layer.width), delta)
        for gradients in _gradients(a, delta):
            total += gradients.square_().sum(0)

    def after() -> bool:
        rotated.clear()
        return into.finite(layer.name for layer in layers)

    fisher_pass(model, layers, spec, rendered, ids, max_tokens_batch, pad_id, add, after)
    into.count("examples", len(rendered))
    return into


def _gradients(a: Tensor, delta: Tensor) -> Iterator[Float[Tensor, "some out in"]]:
    """Σ_t δ_t a_tᵀ of every example, a few examples at once."""
    at_once = max(1, _GRADIENTS // (a.shape[-1] * delta.shape[-1]))
    for i in range(0, a.shape[0], at_once):
        yield delta[i : i + at_once].mT @ a[i : i + at_once]


@dataclass(frozen=True)
class Damping:
    """λ, added to every eigenvalue: `value` itself, or `value` times the mean eigenvalue of the layer."""

    value: float = 0.1
    kind: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        if self.kind not in ("relative", "absolute"):
            raise ConfigError(f"the damping's kind is {self.kind!r}{near(self.kind, ['relative', 'absolute'])}")
        if not 0 <= self.value < float("inf"):
            raise ConfigError(f"the damping is {self.value}; it must be a number of at least 0")


@dataclass(frozen=True)
class Factor:
    """The curvature of one layer. `q_out`, `q_in` are None where the basis is the identity (diagonal, identity);
    `eigenvalues` is None for the identity.

    Raises:
        CurvatureError: on construction, for values that are not finite; names the layer.
    """

    layer: TrackedLayer
    kind: CurvatureKind
    eigenvalues: Float[Tensor, "out in"] | None = None
    q_out: Float[Tensor, "out out"] | None = None
    q_in: Float[Tensor, "in in"] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(CurvatureKind):
            raise CurvatureError(f"the factor of {self.layer.name!r} has the unknown kind {self.kind!r}")
        needs = {"identity": 0, "diagonal": 1}.get(self.kind, 3)
        parts = (self.eigenvalues, self.q_out, self.q_in)
        if any((part is None) == (i < needs) for i, part in enumerate(parts)):
            raise CurvatureError(
                f"the factor of {self.layer.name!r} lacks a part, or has one too many, for {self.kind}"
            )
        if any(part is not None and not bool(torch.isfinite(part).all()) for part in parts):
            raise CurvatureError(
                f"the factor of {self.layer.name!r} holds values that are not finite; fit it again, with the model in "
                f"float32 or bfloat16"
            )


def make_factor(
    layer: TrackedLayer,
    kind: CurvatureKind,
    q_in: Eigenbasis | None = None,
    q_out: Eigenbasis | None = None,
    corrected: Float[Tensor, "out in"] | None = None,
) -> Factor:
    """The Factor of `layer` from what its kind needs: bases (kfac), bases and Λ (ekfac), Λ alone (diagonal)."""
    if kind in ("identity", "diagonal"):
        return Factor(layer, kind, corrected)
    if q_in is None or q_out is None:
        raise CurvatureError(f"the factor of {layer.name!r} needs the eigenbases of its input and its output")
    values = torch.outer(q_out.values, q_in.values) if kind == "kfac" else corrected
    return Factor(layer, kind, values, q_out.vectors, q_in.vectors)


def solve(factor: Factor, v: Float[Tensor, "*many out in"], damping: Damping) -> Float[Tensor, "*many out in"]:
    """(H + λI)⁻¹ V, in the precision of the factor. The identity gives V itself, whatever the damping.

    Where every eigenvalue is zero and the damping relative, no example moves this layer: the result is zero, with a
    warning.

    Raises:
        CurvatureError: V has another shape or is not finite; no damping on a singular factor.
    """
    name, shape = factor.layer.name, (factor.layer.out, factor.layer.width)
    if v.shape[-2:] != shape:
        raise CurvatureError(f"a gradient of the shape {tuple(v.shape)} for the layer {name!r} of the shape {shape}")
    if not bool(torch.isfinite(v).all()):
        raise CurvatureError(f"the gradient of the layer {name!r} is not finite: nothing to solve for")
    if factor.eigenvalues is None:
        return v
    values = factor.eigenvalues
    v = v.to(values)
    largest = float(values.max())
    if largest <= 0:
        log.warning("all eigenvalues of %r are zero: no example of the fit has a gradient there", name)
        if damping.kind == "relative":
            return torch.zeros_like(v)
    added = damping.value * (float(values.mean()) if damping.kind == "relative" else 1.0)
    if added == 0 and float(values.min()) <= torch.finfo(values.dtype).eps * largest:
        raise CurvatureError(
            f"the curvature of {name!r} is singular (eigenvalues {float(values.min()):.3g} to {largest:.3g}) and the "
            f"damping is 0; set a damping, such as 0.1 of the mean eigenvalue"
        )
    if factor.q_out is None or factor.q_in is None:
        return v / (values + added)
    return factor.q_out @ ((factor.q_out.T @ v @ factor.q_in) / (values + added)) @ factor.q_in.T
