"""Test vector: s = H⁻¹∇f, what an example's gradient is multiplied with, and the files it lives in.

In: gradients of behaviours, and factors one layer at a time. Out: a frozen TestVector: for every tracked layer a block
[Q, out, in], dense or of low rank, one row a behaviour (= one score column); a pair of files `<url>.safetensors` +
`<url>.json`. Knows no example, no behaviour's formula and no model but by its identity.

A layer that a behaviour does not reach (it lies above the layer that the behaviour reads) has a zero block for it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from jaxtyping import Float
from torch import Tensor

from connectors import storage
from curate.concepts.concept import same_model
from curate.curvature.blocks import Block, Dense, LowRank, cut, squared
from curate.curvature.ekfac import Damping, Factor, solve
from curate.errors import CurvatureError
from curate.models.tracked import TrackedLayer

FORMAT = "curate.test_vector"
VERSION = 1
_DENSE, _LEFT, _RIGHT, _HEADER = "dense/", "left/", "right/", "header"


@dataclass(frozen=True)
class TestVectorHeader:
    """All of a test vector but its numbers. `names` are the behaviours, in the order of the blocks' first axis.

    `meta`: JSON values only: recipe digest, model identity (`model`: name, digest, adapter), behaviours, damping,
    energy kept, coverage. `digest`: hash of what changes a score.
    """

    __test__ = False  # no test class of pytest

    names: tuple[str, ...]
    layers: tuple[TrackedLayer, ...]
    meta: Mapping[str, Any]
    digest: str


@dataclass(frozen=True, eq=False)
class TestVector:
    """s for Q behaviours. `blocks[layer.name]`: float32, [Q, out, in] (of a LowRank: u·v), one for each of `layers`.

    Raises:
        CurvatureError: on construction, for no or doubled names, or blocks that do not fit the layers.
    """

    __test__ = False

    names: tuple[str, ...]
    layers: tuple[TrackedLayer, ...]
    blocks: Mapping[str, Block]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise CurvatureError(f"a test vector needs behaviours of different names, found {list(self.names)}")
        have, expected = set(self.blocks), {layer.name for layer in self.layers}
        if not self.layers or have != expected or len(expected) != len(self.layers):
            odd = sorted(have ^ expected)
            raise CurvatureError(
                f"a test vector needs one block a tracked layer, found {len(have)} blocks for {len(self.layers)} layers"
                + (f", without a partner: {odd[0]!r}" if odd else "")
            )
        for layer in self.layers:
            shape, wanted = self.blocks[layer.name].shape, (len(self.names), layer.out, layer.width)
            if shape != wanted:
                raise CurvatureError(f"the block of {layer.name} has the shape {shape}, expected {wanted}")

    @cached_property
    def digest(self) -> str:
        """Hash of names, layers, model and numbers."""
        model = self.meta.get("model") or {}
        head = [
            list(self.names),
            [asdict(layer) for layer in self.layers],
            [model.get(k) for k in ("digest", "adapter")],
        ]
        h = hashlib.blake2b(json.dumps(head, sort_keys=True).encode(), digest_size=16)
        for key, array in sorted(_arrays(self).items()):
            h.update(key.encode())
            h.update(np.ascontiguousarray(array, "<f4").data)
        return h.hexdigest()

    @property
    def header(self) -> TestVectorHeader:
        return TestVectorHeader(self.names, self.layers, self.meta, self.digest)

    def norm(self) -> Float[Tensor, " q"]:
        """‖s‖ of every behaviour over all layers, float64."""
        total = torch.zeros(len(self.names), dtype=torch.float64)
        for block in self.blocks.values():
            total += squared(block)
        return total.sqrt()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """A plain dict of arrays that share the blocks' memory, for an object store; `header` holds the rest."""
        header = np.frombuffer(json.dumps(_body(self)).encode(), dtype=np.uint8)
        return {**_arrays(self), _HEADER: header}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> TestVector:
        """The reverse of `to_arrays`, without a copy; the blocks must not be written to (a store's arrays are
        read-only)."""
        return _build(json.loads(bytes(arrays[_HEADER])), {k: _tensor(v) for k, v in arrays.items() if k != _HEADER})


def solve_all(
    gradients: Mapping[str, MutableMapping[str, Tensor]],
    layers: Sequence[TrackedLayer],
    load_factor: Callable[[TrackedLayer], Factor],
    damping: Damping,
    meta: Mapping[str, Any] | None = None,
    rank: int | None = None,
    consume: bool = False,
) -> TestVector:
    """s = (H + λI)⁻¹∇f of every behaviour (METHODS §2), one layer's factor in memory at a time.

    Args:
        gradients: of `query_gradients`: by behaviour and layer name. A layer that none of them has is left out; one
            that some have not is zero for these.
        load_factor: gives a layer's factor. meta: of the test vector; gains `damping`, and what `low_rank` adds.
        rank: each layer's block is cut to it as soon as it is solved, as by `low_rank`; one dense block is in memory.
        consume: take each gradient out of `gradients` as it is solved, so that its memory is free.

    Raises:
        CurvatureError: no gradients, gradients of a layer that is not among `layers`, a singular factor, a rank below
            1, or a result that is not finite or wholly zero (the behaviour is named).
    """
    _check_rank(rank)
    names = tuple(gradients)
    reached = {name for gradient in gradients.values() for name in gradient}
    if stray := sorted(reached - {layer.name for layer in layers}):
        raise CurvatureError(f"there are gradients of {stray[0]!r}, which is none of the {len(layers)} tracked layers")
    used = tuple(layer for layer in layers if layer.name in reached)
    if not used:
        raise CurvatureError("there is no gradient to solve for")
    blocks: dict[str, Block] = {}
    energy = torch.zeros(len(names), dtype=torch.float64)
    for layer in used:
        block = _solved(layer, [gradients[name] for name in names], load_factor(layer), damping, consume)
        energy += squared(block)
        blocks[layer.name] = block if rank is None else cut(block, rank)
        del block  # dense: before the next one is made
    if zero := [name for name, share in zip(names, energy.tolist(), strict=True) if share == 0]:
        raise CurvatureError(
            f"the test vector of {zero[0]!r} is zero: where its gradient is not, no example of the fit has one. Fit on "
            f"more examples, or track other layers"
        )
    vector = TestVector(names, used, blocks, {**(meta or {}), "damping": asdict(damping)})
    return vector if rank is None else with_energy(vector, rank, energy)


def _solved(
    layer: TrackedLayer,
    gradients: Sequence[MutableMapping[str, Tensor]],
    factor: Factor,
    damping: Damping,
    consume: bool,
) -> Dense:
    """The layer's block; zero for a behaviour without a gradient there."""
    block = torch.zeros((len(gradients), layer.out, layer.width))
    have = [q for q, gradient in enumerate(gradients) if layer.name in gradient]
    found = [gradients[q].pop(layer.name) if consume else gradients[q][layer.name] for q in have]
    block[have] = solve(factor, torch.stack(found), damping).to(block)
    if not bool(torch.isfinite(block).all()):
        raise CurvatureError(f"the solution for {layer.name} is not finite; raise the damping ({damping.value})")
    return Dense(block)


def save(vector: TestVector, url: str) -> str:
    """Write `<url>.safetensors`, then `<url>.json`; each atomically, the JSON last. Returns the URL of the JSON file.

    Raises:
        CurvatureError: a number is not finite. StorageError: the place cannot be written.
    """
    stem, arrays = _stem(url), _arrays(vector)
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise CurvatureError(f"the test vector holds NaN or infinite values ({key}); it is not saved")
    storage.write_atomic(stem + ".safetensors", safetensors.numpy.save(arrays))
    text = json.dumps(_body(vector), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    storage.write_atomic(stem + ".json", text + "\n")
    return stem + ".json"


def load_header(url: str) -> TestVectorHeader:
    """The JSON file alone, without a number of s.

    Raises:
        CurvatureError: broken, of another kind, or half a pair. StorageError: nothing is there.
    """
    stem = _stem(url)
    return _header(_read_json(stem), stem)


def load(url: str) -> TestVector:
    """Both files, mapped into memory where they are local, and checked against the stored digest.

    Raises:
        CurvatureError: broken, of another kind, or half a pair. StorageError: nothing is there.
    """
    stem = _stem(url)
    body = _read_json(stem)
    if not storage.exists(stem + ".safetensors"):
        raise CurvatureError(f"{stem}.json has no {stem}.safetensors beside it. {_remedy(stem)}")
    stored = _header(body, stem).digest
    try:
        with safetensors.safe_open(str(storage.local_copy(stem + ".safetensors")), framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (no mapping)
        vector = _build(body, tensors)
    except (ValueError, TypeError, KeyError, safetensors.SafetensorError) as e:
        raise CurvatureError(
            f"the test vector {stem}.safetensors is broken: {type(e).__name__}: {e}. {_remedy(stem)}"
        ) from e
    # A copy from memory keeps the digest that the header gave; here it is worked out from what was read.
    del vector.__dict__["digest"]
    if vector.digest != stored:
        raise CurvatureError(
            f"{stem}.json and {stem}.safetensors do not belong together: the digest is {vector.digest}, the file says "
            f"{stored}. A save was cut off, or a file was edited. {_remedy(stem)}"
        )
    return vector


def check_fits(header: TestVectorHeader | TestVector, identity: Mapping[str, Any]) -> None:
    """
    Raises:
        CurvatureError: `identity` is another model than the one whose gradients s is made of; names both.
    """
    made = header.meta.get("model") or {}
    if not same_model(made, identity):
        raise CurvatureError(
            f"the test vector of {', '.join(header.names)} was made with {title(made)}, but the model to differentiate "
            f"is {title(identity)}. Gradients of one model mean nothing in another; make the test vector again."
        )


def title(identity: Mapping[str, Any]) -> str:
    """A model's identity in words: name, and the beginnings of its digests."""
    marks = [f"{k} {str(identity[k])[:12]}" for k in ("digest", "adapter") if identity.get(k)]
    return str(identity.get("name") or "an unnamed model") + (f" ({', '.join(marks)})" if marks else "")


def restrict(vector: TestVector, keep: Callable[[TrackedLayer], bool]) -> TestVector:
    """The layers of which `keep` is true, and nothing else.

    Raises:
        CurvatureError: none is left.
    """
    layers = tuple(layer for layer in vector.layers if keep(layer))
    if not layers:
        raise CurvatureError(f"none of the {len(vector.layers)} layers of the test vector is left")
    return TestVector(vector.names, layers, {layer.name: vector.blocks[layer.name] for layer in layers}, vector.meta)


def low_rank(vector: TestVector, rank: int) -> tuple[TestVector, float]:
    """Every block as its best approximation of rank `rank`, by SVD, and the share of ‖s‖² that is kept.

    The share is counted from what is really kept. `meta` gains `rank` and `energy_kept` (a share a name).

    Raises:
        CurvatureError: `rank` is less than 1.
    """
    _check_rank(rank)
    blocks = {layer.name: cut(vector.blocks[layer.name], rank) for layer in vector.layers}
    before = vector.norm().square()
    thin = with_energy(TestVector(vector.names, vector.layers, blocks, vector.meta), rank, before)
    total = float(thin.norm().square().sum() / before.sum()) if float(before.sum()) > 0 else 1.0
    return thin, min(total, 1.0)


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise CurvatureError(f"the rank of a test vector is {rank}; it must be at least 1")


def with_energy(thin: TestVector, rank: int, before: Float[Tensor, " q"]) -> TestVector:
    """`thin` with its rank and, by name, its share of the ‖s‖² that was `before` it was cut."""
    shares = torch.where(before > 0, thin.norm().square() / before, 1.0).clamp(max=1.0)
    kept = {"rank": rank, "energy_kept": dict(zip(thin.names, shares.tolist(), strict=True))}
    return TestVector(thin.names, thin.layers, thin.blocks, {**thin.meta, **kept})


def _arrays(vector: TestVector) -> dict[str, np.ndarray]:
    out = {}
    for name, block in vector.blocks.items():
        if isinstance(block, Dense):
            out[_DENSE + name] = _array(block.values)
        else:
            out[_LEFT + name], out[_RIGHT + name] = _array(block.u), _array(block.v)
    return out


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # of arrays that are read-only; nothing here writes to them
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _body(vector: TestVector) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "names": list(vector.names),
        "layers": [asdict(layer) for layer in vector.layers],
        "meta": dict(vector.meta),
        "digest": vector.digest,
    }


def _build(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TestVector:
    layers = tuple(TrackedLayer(**layer) for layer in body["layers"])
    blocks: dict[str, Block] = {}
    for layer in layers:
        if _DENSE + layer.name in tensors:
            blocks[layer.name] = Dense(tensors[_DENSE + layer.name])
        else:
            blocks[layer.name] = LowRank(tensors[_LEFT + layer.name], tensors[_RIGHT + layer.name])
    vector = TestVector(tuple(body["names"]), layers, blocks, body["meta"])
    vector.__dict__["digest"] = body["digest"]  # where cached_property keeps it: not to hash gigabytes in every process
    return vector


def _read_json(stem: str) -> dict[str, Any]:
    if not storage.exists(stem + ".json") and storage.exists(stem + ".safetensors"):
        raise CurvatureError(
            f"{stem}.safetensors has no {stem}.json beside it: the test vector was not written to its end, or one file "
            f"of the pair was left behind. Run the command that makes it again, or copy both."
        )
    try:
        body = json.loads(storage.read_text(stem + ".json"))
    except ValueError as e:
        raise CurvatureError(f"the test vector {stem}.json is broken: {e}. {_remedy(stem)}") from e
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CurvatureError(f"{stem}.json is not a test vector (no format {FORMAT!r} in it). {_remedy(stem)}")
    if body.get("version") != VERSION:
        raise CurvatureError(
            f"{stem}.json has version {body.get('version')!r}; this program reads version {VERSION}. {_remedy(stem)}"
        )
    return body


def _header(body: Mapping[str, Any], stem: str) -> TestVectorHeader:
    try:
        layers = tuple(TrackedLayer(**layer) for layer in body["layers"])
        return TestVectorHeader(tuple(body["names"]), layers, body["meta"], body["digest"])
    except (TypeError, KeyError) as e:
        raise CurvatureError(f"the test vector {stem}.json is broken: {type(e).__name__}: {e}. {_remedy(stem)}") from e


def _remedy(stem: str) -> str:
    return f"Remove {stem}.json and run the same command again; the test vector is then made anew."


def _stem(url: str) -> str:
    return re.sub(r"\.(json|safetensors)$", "", url, flags=re.IGNORECASE)
