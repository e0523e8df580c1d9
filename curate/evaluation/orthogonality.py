"""Orthogonality of a representation: how far its features vary by themselves (paper B §5.2, table 3).

In: rows of features, dense or sparse, a batch at a time. Out: statistics of the Gram matrix G = ZᵀZ, where Z [n, f]
has every column centred and scaled to length 1, so that G_ij is the correlation ρ of features i and j. `spaces`
compares text embeddings, the layer before the SAE and the SAE's latents on the same tokens.

Memory: the products Σ x_i x_j of the upper triangle alone, in float64, in strips of BLOCK features: 4·f² bytes and one
strip (1.2 GB at 16,384 features), whatever the number of rows. Correlations are made from them a strip at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from transformers import PreTrainedModel

from curate.concepts.sae import SAE, encode
from curate.corpus.render import Rendered
from curate.errors import ConfigError
from curate.models.batching import collate, token_batches
from curate.models.tap import LayerTap

BLOCK = 1024
NEAR = 0.1
_BUFFER = 2**22  # nonzero values held back, so that strips are touched rarely
_FEW = 128  # features whose correlations are worked on at once
_CONSTANT = 1e-12  # of a column's mean square: variance that rounding leaves to a column without any
_DENSE_EIGEN = 64  # features up to which all eigenvalues are computed


@dataclass(frozen=True)
class Orthogonality:
    """Statistics over the pairs i ≠ j of features that vary.

    mean_abs, mean_square: of ρ. frobenius: √(mean ρ²), as paper B's table has it; the norm of G's off-diagonal part is
    that times √(f(f−1)). stable_rank: ‖Z‖_F²/‖Z‖₂². near_share: share of pairs with |ρ| < 0.1. features: those that
    vary; constant: those that do not (dead latents), left out. Lower is less entangled, but for the last two: higher.
    """

    space: str
    rows: int
    features: int
    constant: int
    mean_abs: float
    mean_square: float
    frobenius: float
    stable_rank: float
    near_share: float


class Gram:
    """Streams rows of `features` features; see the module's docstring for its memory."""

    def __init__(self, features: int, block: int = BLOCK) -> None:
        self.features = features
        self.rows = 0
        self._starts = range(0, features, block)
        self._strips = [np.zeros((min(block, features - a), features - a)) for a in self._starts]
        self._sum = np.zeros(features)
        self._shift: Float[np.ndarray, " f"] | None = None
        self._held: list[csr_array] = []

    def add(self, x: Float[Tensor, "n features"] | Float[np.ndarray, "n features"]) -> None:
        """More rows. They are shifted by the first batch's mean, which no correlation sees: a feature whose mean is
        a million times its spread keeps its digits.

        Raises:
            ConfigError: another number of features, values that are not finite, or rows after sparse ones.
        """
        rows = (x.double().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)).astype(np.float64)
        self._expect(rows.shape[1])
        _finite(rows)
        if self._held:
            raise ConfigError("sparse and dense rows were given to one Gram; give each space its own")
        if not len(rows):
            return
        if self._shift is None:
            self._shift = rows.mean(axis=0)
        rows = rows - self._shift
        self.rows += len(rows)
        self._sum += rows.sum(axis=0)
        for a, strip in zip(self._starts, self._strips, strict=True):
            strip += rows[:, a : a + len(strip)].T @ rows[:, a:]

    def add_sparse(self, values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]) -> None:
        """More rows, as an SAE encodes them: values at indices, 0 elsewhere; slots with the value 0 are unused.

        Raises:
            ConfigError: as `add`.
        """
        if self._shift is not None:
            raise ConfigError("sparse and dense rows were given to one Gram; give each space its own")
        n, k = values.shape
        data, where = values.double().cpu().numpy().ravel(), indices.cpu().numpy().ravel()
        at = np.repeat(np.arange(n), k)
        used = data != 0
        _finite(data)
        if used.any():
            self._expect(max(self.features, int(where[used].max()) + 1))
        new = csr_array((data[used], (at[used], where[used])), shape=(n, self.features))
        self.rows += n
        self._sum += new.sum(axis=0)
        self._held.append(new)
        if sum(held.nnz for held in self._held) > _BUFFER:
            self._flush()

    def _expect(self, width: int) -> None:
        if width != self.features:
            raise ConfigError(f"rows of {width} features were given to a Gram of {self.features}")

    def _flush(self) -> None:
        rows = vstack(self._held, format="csc")
        for a, strip in zip(self._starts, self._strips, strict=True):
            others = rows[:, a:].tocsr()
            for b in range(0, len(strip), _FEW):
                mine = rows[:, a + b : a + min(b + _FEW, len(strip))]
                strip[b : b + _FEW] += (mine.T.tocsr() @ others).toarray()
        self._held = [self._held[0][:0]]  # an empty one stays, as the mark of what this Gram is given

    def result(self, space: str) -> Orthogonality:
        """The statistics of all rows so far.

        Raises:
            ConfigError: fewer than two rows, or fewer than two features that vary.
        """
        if self._held:
            self._flush()
        mean = self._sum / max(1, self.rows)
        square = np.concatenate([np.diagonal(strip) for strip in self._strips])
        variance = square - self.rows * mean**2
        live = variance > _CONSTANT * np.maximum(square, np.finfo(np.float64).tiny)
        if self.rows < 2 or live.sum() < 2:
            raise ConfigError(
                f"{space}: {self.rows} rows with {int(live.sum())} features that vary; correlations need two of each"
            )
        scale = np.where(live, 1 / np.sqrt(np.where(live, variance, 1.0)), 0.0)
        pairs = int(live.sum()) * (int(live.sum()) - 1) / 2
        total = np.zeros(3)
        for rho, real in self._correlations(mean, scale, live):
            size = np.abs(rho[real])
            total += size.sum(), (size**2).sum(), (size < NEAR).sum()
        mean_abs, mean_square, near = total / pairs
        return Orthogonality(
            space,
            self.rows,
            int(live.sum()),
            int(self.features - live.sum()),
            float(mean_abs),
            float(mean_square),
            float(np.sqrt(mean_square)),
            float(live.sum() / self._largest(mean, scale, live)),
            float(near),
        )

    def _correlations(
        self, mean: np.ndarray, scale: np.ndarray, live: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """ρ, a few features against those from them on, and which entries are pairs i < j that vary."""
        for a, strip in zip(self._starts, self._strips, strict=True):
            for b in range(0, len(strip), _FEW):
                at = slice(a + b, a + min(b + _FEW, len(strip)))
                rho = strip[b : b + _FEW] - self.rows * np.outer(mean[at], mean[a:])
                rho *= np.outer(scale[at], scale[a:])
                later = np.arange(a, self.features) > np.arange(at.start, at.stop)[:, None]
                real = np.outer(live[at], live[a:]) & later
                yield rho, real

    def _largest(self, mean: np.ndarray, scale: np.ndarray, live: np.ndarray) -> float:
        """‖Z‖₂²: the largest eigenvalue of G, by products with the strips."""

        def times(v: np.ndarray) -> np.ndarray:
            w = scale * v.ravel()
            out = np.zeros(self.features)
            for a, strip in zip(self._starts, self._strips, strict=True):
                b = a + len(strip)
                out[a:b] += strip @ w[a:]
                out[b:] += strip[:, len(strip) :].T @ w[a:b]
            return scale * (out - self.rows * mean * (mean @ w))

        if self.features <= _DENSE_EIGEN:
            whole = np.stack([times(column) for column in np.eye(self.features)])
            return float(np.linalg.eigvalsh((whole + whole.T) / 2)[-1])
        operator = LinearOperator((self.features, self.features), matvec=times, dtype=np.float64)
        start = np.where(live, np.random.default_rng(0).standard_normal(self.features), 0.0)
        return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-8, return_eigenvectors=False)[0])


def _finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ConfigError(
            "features hold values that are not finite, so they have no correlations; compute them in a higher "
            "precision, or leave those rows out"
        )


@torch.no_grad()
def spaces(
    model: PreTrainedModel,
    sae: SAE,
    rows: Sequence[Rendered],
    token_budget: int,
    pad_id: int = 0,
    pool: str = "tokens",
    skip_first: int = 0,
) -> tuple[Orthogonality, ...]:
    """Text embeddings (layer 0), the layer before the SAE and its latents, over all tokens of `rows`.

    Args:
        pool: "tokens", a token is a row of the matrix; "mean", the mean over a conversation's tokens is.
        skip_first: tokens left out at the beginning of each conversation: the first often has activations so large
            that it alone decides every correlation of the layer.

    Raises:
        ConfigError: an unknown `pool`; too few rows.
    """
    if pool not in ("tokens", "mean"):
        raise ConfigError(f"pool is {pool!r}; choose 'tokens' or 'mean'")
    tap = LayerTap(model, sorted({0, sae.layer}))
    d = sae.width
    grams = {"text embeddings": Gram(d), f"layer {sae.layer}": Gram(d), "SAE latents": Gram(sae.latents)}
    text, before, latent = grams.values()
    lengths = [len(r.input_ids) for r in rows]
    for batch in token_batches(lengths, token_budget):
        ids, mask = collate([rows[i].input_ids for i in batch], pad_id, device=model.device)
        states = tap(ids)
        mask[:, :skip_first] = 0
        for row, real in enumerate(mask.bool()):
            if not real.any():
                continue
            x0, x = states[0][row][real], states[sae.layer][row][real]
            sparse = encode(sae, x)
            if pool == "mean":
                dense = torch.zeros(sae.latents, dtype=torch.float64, device=x.device)
                dense.index_add_(0, sparse.indices.flatten(), sparse.values.double().flatten())
                fires = dense.nonzero()[:, 0]
                text.add(x0.double().mean(0, keepdim=True))
                before.add(x.double().mean(0, keepdim=True))
                latent.add_sparse((dense[fires] / len(x))[None], fires[None])
            else:
                text.add(x0)
                before.add(x)
                latent.add_sparse(sparse.values, sparse.indices)
    return tuple(gram.result(space) for space, gram in grams.items())
