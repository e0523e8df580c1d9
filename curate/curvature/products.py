"""Curvature products: H v of the mean response loss of some rows, for several v at once, by the tracked weights.

In: a model, tracked layers, tokenised rows, an SAE or none. Out: {layer: [q, out, in]} for vectors of that form. Knows
no solver and no file; never makes H, a per-row gradient, or [rows, tokens, vocabulary].

    L = (1/N) Σ_i L_i, L_i the mean ("mean") or sum ("sum") of row i's response losses, as everywhere else
    hessian       ∂²L/∂θ² v, by Pearlmutter's trick: the gradient is itself differentiated along v
    gauss_newton  (1/N) Σ_i (1/n_i) Σ_t J_tᵀ H_t J_t v, with J_t = ∂h_t/∂θ of the last hidden state and H_t the loss's
                  curvature there (output_hessian.py): positive semi-definite, and equal to the true Fisher, which
                  EK-FAC approximates from sampled labels (fisher.py weighs rows and tokens in the same way)

With an SAE at layer l its reconstruction takes the place of hidden_states[l] (METHODS §5): the tracked layers lie in
blocks ≥ l, and what is below is fixed. Either way the states that enter the lowest tracked block are computed once for
all products and kept: 4 · tokens · d bytes in float32.

Cost, in forwards F of the blocks above: gauss_newton about 2 + 4q F (tangents of all v beside one value, then a
backward for each), hessian 3 + 6q F; the graph of one batch is in memory. Attention is the written-out one, since the
fused kernels have neither forward mode nor a second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from curate.concepts.sae import SAE
from curate.corpus.render import Rendered
from curate.curvature.fisher import Reduction
from curate.curvature.output_hessian import gauss_newton_output, weighted_loss
from curate.errors import ConfigError, CurvatureError, ModelError, near
from curate.models.batching import collate, token_batches
from curate.models.response_loss import loss_counts, predicting_mask
from curate.models.splice import downstream, spliced
from curate.models.tap import LayerTap
from curate.models.tracked import TrackedLayer

# Tangents carried at once, which share the value that they are of; more of them are carried in another pass.
_TANGENTS = 8

Product = Literal["gauss_newton", "hessian"]
Vectors = dict[str, Tensor]
"""By layer name: [q, out, in]."""


@dataclass(frozen=True)
class _Batch:
    """Rows on their way: the states that enter the lowest tracked block; which of the last states, row after row,
    predict; their targets, and what each one's loss counts in L."""

    x: Float[Tensor, "batch tokens d"]
    predicting: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    weights: Float[Tensor, " n"]


class _Above(nn.Module):
    """The blocks from `layer` up as a module of its own, whose weights `functional_call` can exchange."""

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Tensor:
        return downstream(self.model, self.layer, x)


class Products:
    """Called with vectors, it gives H v, summed in float32 (float64 in a float64 model).

    Args:
        model: in eval mode, no weight asking for gradients, and not inside `spliced`. In half precision products are
            noisy, and a solver that needs many of them in a row will not get far: load it in float32.
        layers: those of the vectors.
        rows: of the empirical loss. A loss of 4 rows or fewer is unstable (METHODS §5); their number is the caller's.
        max_tokens: token budget of a batch, padding included; products do not depend on it.

    Raises:
        CurvatureError: no row, a row without a response token (its place is named), no layer, or a layer below the SAE.
        ConfigError: an unknown kind or reduction. ModelError: the model's weights ask for gradients.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[TrackedLayer],
        rows: Sequence[Rendered],
        kind: Product = "gauss_newton",
        reduction: Reduction = "mean",
        max_tokens: int = 8192,
        pad_id: int = 0,
        sae: SAE | None = None,
    ) -> None:
        for what, value, known in (("product", kind, Product), ("reduction", reduction, Reduction)):
            if value not in get_args(known):
                raise ConfigError(f"the curvature's {what} is {value!r}{near(value, get_args(known))}")
        if any(p.requires_grad for p in model.parameters()):
            raise ModelError("the model's weights require gradients; call model.requires_grad_(False) first")
        if not layers:
            raise CurvatureError("there is no tracked layer to take curvature of")
        if not rows:
            raise CurvatureError("there is no row to take the curvature of the loss of")
        for i, row in enumerate(rows):
            if row.end <= max(row.start, 1):
                raise CurvatureError(f"row {i} of the curvature's sample has no response token to take a loss of")
        self.model, self.kind, self.rows = model, kind, len(rows)
        self.layers = list(layers)
        self.lowest = min(layer.block for layer in layers)
        if sae is not None and self.lowest < sae.layer:
            raise CurvatureError(
                f"the SAE {sae.name!r} is spliced in at layer {sae.layer}, but the tracked layers begin at block "
                f"{self.lowest}, below it; track blocks from {sae.layer} on (curvature.layers.first={sae.layer})"
            )
        self._above = _Above(model, self.lowest)
        self._turned = {x.name for x in layers if isinstance(model.get_submodule(x.name), Conv1D)}
        self._weights = {x.name: cast(Tensor, model.get_submodule(x.name).weight).detach() for x in layers}
        self._wide = torch.promote_types(model.dtype, torch.float32)
        with nullcontext() if sae is None else spliced(model, sae):
            self._batches = [
                self._prepare([rows[i] for i in index], reduction, pad_id)
                for index in token_batches([row.end for row in rows], max_tokens)
            ]

    def _prepare(self, rows: Sequence[Rendered], reduction: Reduction, pad_id: int) -> _Batch:
        ids, _ = collate([row.input_ids[: row.end] for row in rows], pad_id, device=self.model.device)
        starts, ends = [row.start for row in rows], [row.end for row in rows]
        predicting = predicting_mask(starts, ends, ids.shape[1] - 1, ids.device)
        x = LayerTap(self.model, [self.lowest])(ids[:, :-1])[self.lowest]
        counts = loss_counts(starts, ends)
        each = torch.tensor([1.0 / (self.rows * (n if reduction == "mean" else 1)) for n in counts], dtype=self._wide)
        weights = each.to(ids.device).repeat_interleave(torch.tensor(counts, device=ids.device))
        return _Batch(x, predicting.flatten().nonzero()[:, 0], ids[:, 1:][predicting], weights)

    @property
    def size(self) -> int:
        """Tracked weights."""
        return sum(layer.size for layer in self.layers)

    def __call__(self, vectors: Mapping[str, Float[Tensor, "q out in"]]) -> Vectors:
        """
        Raises:
            CurvatureError: vectors of other layers or shapes, or a product that is not finite.
        """
        q = self._check(vectors)
        moves = {name: self._as_stored(name, v.to(self._weights[name])) for name, v in vectors.items()}
        total = {
            layer.name: torch.zeros((q, layer.out, layer.width), dtype=self._wide, device=self.model.device)
            for layer in self.layers
        }
        add = self._gauss_newton if self.kind == "gauss_newton" else self._hessian
        for batch in self._batches:
            with sdpa_kernel(SDPBackend.MATH):
                for i, found in enumerate(add(batch, moves, q)):
                    for name, part in found.items():
                        total[name][i] += self._as_stored(name, part)
        marks = torch.stack([t.sum() for t in total.values()])
        if not bool(torch.isfinite(marks).all()):
            raise CurvatureError(
                f"a {self.kind.replace('_', '-')} product over {self.rows} rows is not finite; run the model in "
                f"float32, or leave out the rows whose loss is not finite"
            )
        return total

    def _check(self, vectors: Mapping[str, Tensor]) -> int:
        sizes = {v.shape[0] for v in vectors.values()}
        if set(vectors) != set(self._weights) or len(sizes) != 1:
            odd = sorted(set(vectors) ^ set(self._weights))
            raise CurvatureError(f"the vectors are of other layers than the products{f': {odd[0]!r}' if odd else ''}")
        for layer in self.layers:
            if vectors[layer.name].shape[1:] != (layer.out, layer.width):
                raise CurvatureError(
                    f"a vector of the shape {tuple(vectors[layer.name].shape)} for the layer {layer.name!r} of the "
                    f"shape {(layer.out, layer.width)}"
                )
        return sizes.pop()

    def _as_stored(self, name: str, v: Tensor) -> Tensor:
        """W [out, in] as the module keeps it, or the other way round: GPT-2's Conv1D keeps it transposed."""
        return v.mT if name in self._turned else v

    def _last(self, batch: _Batch, weights: Mapping[str, Tensor]) -> Float[Tensor, "n d"]:
        """Last hidden states that predict, with these weights in the place of the model's own."""
        own = {f"model.{name}.weight": weight for name, weight in weights.items()}
        return functional_call(self._above, own, (batch.x,)).flatten(0, 1)[batch.predicting]

    def _leaves(self) -> dict[str, Tensor]:
        """The tracked weights as leaves that gradients are taken by."""
        return {name: weight.detach().requires_grad_(True) for name, weight in self._weights.items()}

    def _gauss_newton(self, batch: _Batch, moves: Mapping[str, Tensor], q: int) -> Iterator[dict[str, Tensor]]:
        def tangent(move: dict[str, Tensor]) -> Tensor:
            return jvp(lambda weights: self._last(batch, weights), (self._weights,), (move,))[1]

        with torch.no_grad():
            moved = vmap(tangent, chunk_size=_TANGENTS)(dict(moves))
        with torch.enable_grad():
            leaves = self._leaves()
            last = self._last(batch, leaves)
            pulled = gauss_newton_output(self.model, last.detach(), moved, batch.weights)
            for i in range(q):
                yield self._gradient([last], leaves, [pulled[i].to(last.dtype)], i < q - 1)

    def _hessian(self, batch: _Batch, moves: Mapping[str, Tensor], q: int) -> Iterator[dict[str, Tensor]]:
        with torch.enable_grad():
            leaves = self._leaves()
            loss = weighted_loss(self.model, self._last(batch, leaves), batch.targets, batch.weights)
            slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            for i in range(q):
                yield self._gradient(slopes, leaves, [moves[name][i] for name in leaves], i < q - 1)

    def _gradient(
        self, outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], along: Sequence[Tensor], again: bool
    ) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            outputs, list(leaves.values()), along, retain_graph=again, allow_unused=True, materialize_grads=True
        )
        return {name: part.detach().to(self._wide) for name, part in zip(leaves, found, strict=True)}
