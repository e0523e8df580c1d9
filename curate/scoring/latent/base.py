"""Latent influence: how much training on a row, through each latent active on each of its tokens, raises a behaviour.

In: a model, a sparse autoencoder (SAE) at layer l, a test vector s over weights of blocks ≥ l, tokenised rows. Out: for
every row the active latents of its tokens and their influence, [q, tokens, k], sparse (paper B eq. 15-20, 37; METHODS
§5). Knows no file and not where s comes from.

With x̃ = decode(r) in the place of hidden_states[l] and P(r) = ⟨s, ∇_θ₂ L(row; r)⟩, the influence is −(∇_r P) ⊙ r: the
sign of every scorer, positive = training on the row raises the behaviour that s is of (of f = −L(test): it helps the
test prediction). The paper's sign is the opposite one, the change of the test's loss.

What is differentiated is x̃, not r: ∇_r = (∂x̃/∂r)ᵀ ∇_x̃ is the product of a token's ∇_x̃ with the decoder's rows of its
active latents. So the number of latents costs the encoder's product and nothing else, no gradient by a latent that is
not active is ever made, and a latent without activation has influence 0 exactly.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from curate.concepts.decode import read_rows
from curate.concepts.sae import SAE, Sparse, check_width, decode, encode, encode_flops
from curate.corpus.render import Rendered
from curate.curvature.fisher import Reduction
from curate.curvature.test_vector import TestVector
from curate.errors import BadRow, ConceptError, ConfigError, CurvatureError, ModelError, near
from curate.models.batching import collate, token_batches
from curate.models.flops import model_cost
from curate.models.response_loss import loss_counts, predicting_mask
from curate.models.splice import downstream
from curate.models.tap import LayerTap, n_layers, width
from curate.scoring.base import PassStats
from curate.scoring.directional.base import check_layers, sum_dtype
from curate.scoring.directional.stacked import Stacked

Sign = Literal["ours", "paper"]
# Weights by their name in Downstream; a direction has one more axis in front, the queries.
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class RowLatents:
    """One row's latents, token by token; t tokens [0, end) of the row, k the most that are active on one of them.

    indices: int32 [t, k]. activations: [t, k]. influence: [q, t, k]. A slot without an active latent is 0 in all three.
    Numbers are float32, of a float64 model float64. Nothing is predicted from the last token: its influence is 0.
    """

    indices: NDArray[np.int32]
    activations: NDArray[np.floating]
    influence: NDArray[np.floating]


@dataclass(frozen=True)
class LatentBatch:
    """A batch as the backends see it. `x` [batch, tokens, d]: x̃ in the model's precision, padding behind the rows.

    `where` [n]: the positions of the flattened x whose states predict a token of the loss, row by row. `targets` [n]:
    these tokens. `divisors` [batch]: 1 or the row's number of such tokens.
    """

    x: Float[Tensor, "batch tokens d"]
    where: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    divisors: Float[Tensor, " batch"]


class Downstream(nn.Module):
    """Last hidden states [n, d] at chosen positions, of states at a layer: what `functional_call` needs to have tracked
    weights in the place of the model's own."""

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Float[Tensor, "batch tokens d"], where: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return downstream(self.model, self.layer, x).flatten(0, 1)[where]


class LatentBackend(ABC):
    """One way to ∇_x̃ P.

    Args:
        model: in eval mode, no weight asking for gradients.
        sae: its layer and width are the model's. Activations are float32 at least, whatever the model's precision. The
            model itself is not spliced: x is read as the model has it, and then replaced here.
        vector: s of one or several test vectors, whose queries come one after another. Not to be written to.
        token_budget: tokens of a batch, padding included, for one query; a backend that carries several at once takes
            fewer tokens for them. Lower it if memory runs out; the influence stays the same.
        pad_id: any valid token id; no real token sees the padding.
        reduction: a row's loss is the mean or the sum of its response losses.
        sign: "ours" (positive raises the behaviour), or "paper" for the opposite.

    Attributes: `names`, the queries; `stats`, the sum over all runs.

    Raises:
        CurvatureError: a layer of s is not in the model, has another shape, or lies below the SAE; s is zero or not
            finite.
        ConceptError: the SAE is of another width, or at a layer that the model does not have or with no block above.
        ConfigError: a budget below 1, an unknown reduction or sign.
        ModelError: the model's weights ask for gradients.
    """

    name: str

    def __init__(
        self,
        model: PreTrainedModel,
        sae: SAE,
        vector: TestVector | Sequence[TestVector],
        token_budget: int = 2048,
        pad_id: int = 0,
        reduction: Reduction = "mean",
        sign: Sign = "ours",
    ) -> None:
        if token_budget < 1:
            raise ConfigError(f"the token budget of a batch is {token_budget}; it must be at least 1")
        for what, value, choices in (("reduction of the loss", reduction, Reduction), ("sign", sign, Sign)):
            if value not in get_args(choices):
                raise ConfigError(f"the {what} is {value!r}{near(value, get_args(choices))}")
        if any(p.requires_grad for p in model.parameters()):
            raise ModelError("the model's weights require gradients; call model.requires_grad_(False) first")
        check_sae(model, sae)
        vectors = [vector] if isinstance(vector, TestVector) else list(vector)
        for each in vectors:
            check_layers(model, each)
            check_above(each, sae)
        stacked = Stacked(vectors)
        _check_norms(stacked)
        self.model, self.device, self.names = model, model.device, stacked.names
        self.sae = sae.to(self.device, sum_dtype(model.dtype))
        self.token_budget, self.pad_id, self.reduction = token_budget, pad_id, reduction
        self.stats = PassStats()
        self._factor = -1.0 if sign == "ours" else 1.0
        self._tap = LayerTap(model, [sae.layer])
        self._down = Downstream(model, sae.layer)
        self._cost, self._tracked = model_cost(model), sum(layer.size for layer in stacked.layers)
        self._stacked = stacked
        self._blocks, self._units = stacked.directions(model)
        self._modules = {layer.name: model.get_submodule(layer.name) for layer in stacked.layers}
        self._weights: Weights = {_inner(name): _weight(module) for name, module in self._modules.items()}

    def run(self, rows: Sequence[Rendered], queries: Sequence[int] | None = None) -> list[RowLatents | BadRow]:
        """Latents of `rows` in their order, in batches of like lengths.

        Args:
            queries: which of `names` to differentiate along, by number; None: all. What does not depend on s is shared.

        Returns a BadRow in the place of a row that has no token with a loss, or whose activations or influence are not
        finite; the rows beside it are as they would be without it.
        """
        began = time.perf_counter()
        chosen = list(range(len(self.names))) if queries is None else list(queries)
        counts = loss_counts([r.start for r in rows], [r.end for r in rows])
        found: list[RowLatents | BadRow] = [BadRow("no response token to take a loss of") for _ in rows]
        index = [i for i, count in enumerate(counts) if count > 0]
        padded = batches = 0
        for part in token_batches([rows[i].end for i in index], self._tokens_at_once(len(chosen))):
            batch = [index[i] for i in part]
            latents = self._batch([rows[i] for i in batch], chosen)
            for i, one in zip(batch, latents, strict=True):
                found[i] = one
            padded, batches = padded + len(batch) * max(rows[i].end for i in batch), batches + 1
        lengths = [rows[i].end for i in index]
        self.stats += PassStats(
            rows=len(rows),
            tokens=sum(lengths),
            padded_tokens=padded,
            batches=batches,
            seconds=time.perf_counter() - began,
            flops=self._flops(lengths, sum(counts[i] for i in index), len(chosen)),
        )
        return found

    def _batch(self, rows: Sequence[Rendered], queries: Sequence[int]) -> list[RowLatents | BadRow]:
        ends = [r.end for r in rows]
        ids, mask = collate([r.input_ids[: r.end] for r in rows], self.pad_id, "right", self.device)
        x = self._tap(ids)[self.sae.layer]
        real = mask.bool()
        with torch.no_grad():
            sparse = encode(self.sae, x[real])
            finite = torch.isfinite(sparse.values).all(-1) & torch.isfinite(x[real]).all(-1)
            good = [bool(part.all()) for part in finite.split(ends)]
            spliced = x.clone()
            spliced[real] = decode(self.sae, sparse).to(x.dtype)
        gradient = spliced.new_zeros((len(queries), *spliced.shape), dtype=self.sae.w_dec.dtype)
        if any(good) and queries:
            keep = [i for i, ok in enumerate(good) if ok]
            batch = self._prepare(spliced[keep, :-1], ids[keep], [rows[i] for i in keep])
            gradient[:, keep, :-1] = self._gradients(batch, queries).to(gradient.dtype)
        influence = sparse.values.new_zeros((len(queries), *sparse.values.shape))
        for out, part in zip(influence, gradient, strict=True):
            out.copy_(self._at_latents(sparse, part[real]))
        parts = (sparse.values.split(ends), sparse.indices.split(ends), influence.split(ends, dim=1))
        return [
            _row(values, indices, part, self._factor) if ok else BadRow("its activations or latents are not finite")
            for ok, values, indices, part in zip(good, *parts, strict=True)
        ]

    def _prepare(self, x: Tensor, ids: Tensor, rows: Sequence[Rendered]) -> LatentBatch:
        starts, ends = [r.start for r in rows], [r.end for r in rows]
        mask = predicting_mask(starts, ends, x.shape[1], self.device)
        counts = loss_counts(starts, ends)
        divisors = torch.tensor(counts, dtype=self.sae.w_dec.dtype, device=self.device)
        return LatentBatch(
            x.contiguous(),
            mask.flatten().nonzero()[:, 0],
            ids[:, 1:][mask],
            divisors if self.reduction == "mean" else torch.ones_like(divisors),
        )

    def _at_latents(self, sparse: Sparse, slope: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """∇_r P ⊙ r of ∇_x̃ P: the decoder is linear in r, and scales each token's reconstruction."""
        slope = slope / self.sae.scale if sparse.gain is None else slope * sparse.gain
        return read_rows(slope, sparse.indices, self.sae.w_dec) * sparse.values

    def _gradients(self, batch: LatentBatch, queries: Sequence[int]) -> Float[Tensor, "q batch tokens d"]:
        """∇_x̃ ⟨s_q, ∇L_i⟩ of every row's own loss."""
        found = self._slopes(batch, queries)
        units = self._units[list(queries)].to(found.device, found.dtype)
        return found * units[:, None, None, None] / batch.divisors.to(found.dtype)[:, None, None]

    @abstractmethod
    def _slopes(self, batch: LatentBatch, queries: Sequence[int]) -> Float[Tensor, "q batch tokens d"]:
        """∇_x̃ of ⟨s_q, ∇ Σ of the rows' summed losses⟩: a row's states reach its own loss alone."""

    def _tokens_at_once(self, queries: int) -> int:
        """Token budget of a batch that is differentiated along so many queries."""
        return self.token_budget

    def _direction(self, queries: Sequence[int]) -> Weights:
        """s of some queries, [q, …] as the weights lie in memory (Conv1D keeps them transposed)."""
        found, chosen = {}, torch.as_tensor(list(queries))
        for name, block in self._blocks.items():
            picked = [part[chosen.to(part.device)] for part in block]
            dense = picked[0] if len(picked) == 1 else picked[0] @ picked[1]
            transposed = isinstance(self._modules[name], Conv1D)
            found[_inner(name)] = dense.mT.contiguous() if transposed else dense
        return found

    def _flops(self, lengths: Sequence[int], loss_tokens: int, queries: int) -> float:
        """The forward to the layer, the latents, and what the backend does above."""
        layer, cost = self.sae.layer, self._cost
        below, back = cost.flops(lengths, layer), cost.gradient_flops(lengths, layer, loss_tokens)
        above = cost.flops(lengths, None, loss_tokens) - below
        return below + encode_flops(self.sae, sum(lengths)) + self._flops_above(above + back, lengths, queries)

    def _flops_above(self, once: float, lengths: Sequence[int], queries: int) -> float:
        """`once`: of a forward and a backward. Once for all queries and once for each, and s twice a query.

        A query costs attention's products twice: each of them, bilinear in values that both have tangents, has two
        such products for its tangent, and as many more in the backward.
        """
        layers = self._cost.blocks - self.sae.layer
        attention = 6.0 * layers * self._cost.attention * sum(n * n for n in lengths)
        return once + queries * (once + attention + 4.0 * self._tracked * sum(lengths))


def check_sae(model: PreTrainedModel, sae: SAE) -> None:
    """
    Raises:
        ConceptError: the SAE is of another width than the model, or at a layer with no block above it.
    """
    check_width(sae, width(model), type(model).__name__)
    blocks = n_layers(model)
    if sae.layer >= blocks:
        raise ConceptError(
            f"the SAE {sae.name!r} is of layer {sae.layer}; influence goes through the weights above it, and the model "
            f"has the blocks 0 to {blocks - 1}. Use an SAE of a layer from 0 to {blocks - 1}."
        )


def check_above(vector: TestVector, sae: SAE) -> None:
    """
    Raises:
        CurvatureError: s has a block for a layer below the SAE, whose weights the latents do not reach.
    """
    below = [layer for layer in vector.layers if layer.block < sae.layer]
    if below:
        raise CurvatureError(
            f"the test vector of {', '.join(vector.names[:3])} has {len(below)} of {len(vector.layers)} layers below "
            f"the SAE {sae.name!r}, such as {below[0].name!r} in block {below[0].block}: what the latents of layer "
            f"{sae.layer} influence are the blocks from {sae.layer} on. Track these alone (first={sae.layer})."
        )


def _check_norms(stacked: Stacked) -> None:
    for name, norm in zip(stacked.names, stacked.norm().tolist(), strict=True):
        if not np.isfinite(norm):
            raise CurvatureError(f"the test vector of {name!r} is not finite; solve for it again with more damping")
        if norm == 0:
            raise CurvatureError(
                f"the test vector of {name!r} is zero, and so would be every influence. Its behaviour has no gradient "
                f"at the tracked layers: track others, or leave it out."
            )


def _row(values: Tensor, indices: Tensor, influence: Tensor, factor: float) -> RowLatents | BadRow:
    """A row with no more slots than its fullest token needs: what a neighbour needs must not show."""
    if not bool(torch.isfinite(influence).all()):
        return BadRow("the influence on its latents is not finite")
    active = values > 0
    k = int(active.sum(-1).max())
    if k < values.shape[1]:
        # Active slots first, in the order that they came in.
        order = torch.argsort((~active).to(torch.uint8), dim=-1, stable=True)[:, :k]
        values, indices = values.gather(1, order), indices.gather(1, order)
        influence = influence.gather(2, order.expand(influence.shape[0], -1, -1))
    influence = torch.where(influence != 0, influence * factor, 0.0)  # no minus zero
    return RowLatents(_host(indices).astype(np.int32), _host(values), _host(influence))


def _host(values: Tensor) -> NDArray[np.floating]:
    return values.detach().cpu().numpy()


def _inner(name: str) -> str:
    return f"model.{name}.weight"


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
