"""Concept: a direction of the residual stream for every layer, and the files it lives in.

In: vectors [L+1, d] and what they were made from. Out: a frozen Concept, its unit direction at one layer, a pair of
files `<url>.safetensors` + `<url>.json`. Knows no model, no tokenizer and no corpus: `check_fits` compares with numbers
and an identity that the caller took from the model.

Layer convention: row l belongs to `hidden_states[l]` of Hugging Face. 0 is the embeddings, l the output of block l-1
(counted from 0), the last row is after the final norm. Rows of NaN mean: no direction there. Vectors are stored as
they were made, not normalised; `direction` normalises.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, get_args

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from connectors import storage
from curate.concepts.formats import Pooling, read_gguf, read_pt
from curate.errors import ConceptError

FORMAT = "curate.concept"
VERSION = 1
_LAYERS = "row l is hidden_states[l]: 0 embeddings, l the output of block l-1, the last after the final norm"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FOREIGN = (".pt", ".pth", ".gguf")


@dataclass(frozen=True, eq=False)
class Concept:
    """A named direction.

    `vectors` [L+1, d] float32, not normalised; a row is wholly finite or wholly NaN (not defined there).
    `layer` the recommended row, or None. `model` the identity of the model whose activations it was made from: name,
    digest, adapter (empty when the file does not say). `meta` JSON values only: counts, how it was made, `profile` (a
    dict a layer: layer, norm, auc, separation). `partial_rows` in meta says that the number of rows is not L+1.

    Raises:
        ConceptError: on construction, for a name that cannot be part of a column's name, vectors that are not
            [L+1, d], rows that mix numbers and NaN, no usable row, or a layer that has none.
    """

    name: str
    vectors: Float[np.ndarray, "rows d"]
    layer: int | None
    model: Mapping[str, Any]
    method: str
    pooling: Pooling
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConceptError(
                f"a concept cannot be called {self.name!r}: the name becomes part of a column's name, so use letters, "
                f"digits, '-' and '_'"
            )
        if self.pooling not in get_args(Pooling):
            raise ConceptError(f"concept {self.name!r}: unknown pooling {self.pooling!r}; one of {get_args(Pooling)}")
        v = np.ascontiguousarray(self.vectors, dtype=np.float32)
        if v.ndim != 2 or 0 in v.shape:
            raise ConceptError(f"concept {self.name!r}: vectors have the shape {v.shape}, expected [layers + 1, width]")
        mixed = np.flatnonzero(~(np.isfinite(v).all(axis=1) | np.isnan(v).all(axis=1)))
        if len(mixed):
            raise ConceptError(
                f"concept {self.name!r}: the vector of layer {mixed[0]} holds NaN or infinite values "
                f"({len(mixed)} of {len(v)} layers do). Make the concept again, in float32 if it was made in float16."
            )
        v.setflags(write=False)
        object.__setattr__(self, "vectors", v)
        if not self.layers():
            raise ConceptError(f"concept {self.name!r} has no direction at any layer: every vector is zero or NaN")
        if self.layer is not None:
            self.check_layer(self.layer)

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return int(self.vectors.shape[1])

    def layers(self) -> list[int]:
        """The layers that have a direction: finite and not zero."""
        usable = np.isfinite(self.vectors).all(axis=1) & self.vectors.any(axis=1)
        return [int(i) for i in np.flatnonzero(usable)]

    def check_layer(self, layer: int) -> None:
        """Raise ConceptError unless `layer` has a direction; the message lists the layers that have one."""
        usable = self.layers()
        if layer not in usable:
            last = len(self.vectors) - 1
            why = "its vector is zero or not defined" if 0 <= layer <= last else f"its layers are 0 to {last}"
            raise ConceptError(
                f"concept {self.name!r} has no direction at layer {layer}: {why}. Layers with one: {_runs(usable)}."
            )


def direction(concept: Concept, layer: int | None = None) -> Float[np.ndarray, " d"]:
    """v / ‖v‖ at `layer` (default: the recommended one), float32 [d] (the unit vector of eq. 12-15).

    Raises:
        ConceptError: no such layer, no direction there, or no layer given and none recommended.
    """
    if layer is None:
        layer = concept.layer
    if layer is None:
        raise ConceptError(
            f"concept {concept.name!r} recommends no layer; name one, of {_runs(concept.layers())} "
            f"(a layer near the middle is a usual choice)"
        )
    concept.check_layer(layer)
    v = concept.vectors[layer].astype(np.float64)
    v /= np.abs(v).max()  # so that the square of a tiny or huge value neither vanishes nor overflows
    return (v / np.linalg.norm(v)).astype(np.float32)


def digest(concept: Concept) -> str:
    """Hash of what changes a score: name, vectors, recommended layer, pooling, model. Not how it was made."""
    head = [concept.name, concept.layer, concept.pooling, concept.model, list(concept.vectors.shape)]
    h = hashlib.blake2b(json.dumps(head, sort_keys=True, separators=(",", ":")).encode(), digest_size=16)
    h.update(_vector_bytes(concept.vectors))
    return h.hexdigest()


def check_fits(
    concept: Concept,
    n_layers: int,
    width: int,
    identity: Mapping[str, Any],
    layers: Iterable[int] = (),
    allow_other_model: bool = False,
) -> None:
    """Check a concept against the model that is to be scored.

    Args:
        n_layers: L, the number of blocks. width: d. identity: of the model, as stored in `Concept.model`.
        layers: rows that will be used. allow_other_model: accept a concept of another model of the same shape.

    Raises:
        ConceptError: another width, another number of layers, a layer without a direction, or another model.
    """
    who = f"concept {concept.name!r}"
    if concept.width != width:
        raise ConceptError(
            f"{who} has width {concept.width}, the model {title(identity)} has {width}. It was made from "
            f"{title(concept.model)}; make it again from the model that you score with."
        )
    rows = len(concept.vectors)
    partial = bool(concept.meta.get("partial_rows"))
    if rows > n_layers + 1 or (rows < n_layers + 1 and not partial):
        raise ConceptError(
            f"{who} has {rows} rows, made for a model of {rows - 1} layers; {title(identity)} has {n_layers} layers "
            f"({n_layers + 1} rows, the embeddings included)"
        )
    for layer in layers:
        concept.check_layer(layer)
    if not allow_other_model and not same_model(concept.model, identity):
        raise ConceptError(
            f"{who} was made from {title(concept.model)}, but the model to score with is {title(identity)}. Vectors "
            f"of one model mean nothing in another, even of equal width. Make the concept again, or set "
            f"concept.<name>.allow_other_model=true if the two share their base."
        )


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities can be the same model: `digest` and `adapter` agree. An unknown one (of a foreign file)
    fits all."""
    if not one.get("digest") or not other.get("digest"):
        return True
    return all(one.get(k) == other.get(k) for k in ("digest", "adapter"))


def save(concept: Concept, url: str) -> str:
    """Write `<url>.safetensors`, then `<url>.json`; each atomically. The JSON, written last, makes the concept whole.

    `url` may carry one of the two suffixes. Returns the URL of the JSON file.

    Raises:
        StorageError: the place cannot be written.
    """
    stem = _stem(url)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "name": concept.name,
        "method": concept.method,
        "layer": concept.layer,
        "pooling": concept.pooling,
        "layers": _LAYERS,
        "normalised": False,
        "shape": list(concept.vectors.shape),
        "model": concept.model,
        "meta": as_json(concept.meta),
        "digest": digest(concept),
    }
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    storage.write_atomic(stem + ".safetensors", safetensors.numpy.save({"vectors": np.array(concept.vectors)}))
    storage.write_atomic(stem + ".json", text + "\n")
    return stem + ".json"


def load(url: str, name: str | None = None, key: str | None = None) -> Concept:
    """Read a concept by its suffix: our own pair (`.json`, `.safetensors` or none), `.pt`/`.pth`, `.gguf`.

    Args:
        name: another name than the file's. key: which entry of a `.pt` file that holds several.

    Raises:
        ConceptError: a broken file, half a pair, an unknown suffix, or no usable vector. StorageError: not there.
    """
    suffix = PurePosixPath(url).suffix.lower()
    if suffix in _FOREIGN:
        read = read_gguf(url) if suffix == ".gguf" else read_pt(url, key)
        return Concept(name or read.name, read.vectors, None, {}, read.method, read.pooling, read.meta)
    if suffix not in ("", ".json", ".safetensors") and not storage.exists(url + ".json"):
        raise ConceptError(f"{url}: unknown kind of concept file; known are .json with .safetensors, .pt, .pth, .gguf")
    concept = _load_own(_stem(url))
    return replace(concept, name=name) if name else concept


def _load_own(stem: str) -> Concept:
    if not storage.exists(stem + ".json") and storage.exists(stem + ".safetensors"):
        raise ConceptError(
            f"{stem}.safetensors has no {stem}.json beside it: the concept was not written to its end, or one file of "
            f"the pair was left behind. Make or copy it again."
        )
    try:
        body = json.loads(storage.read_text(stem + ".json"))
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ConceptError(f"{stem}.json is not a concept file (no format {FORMAT!r} in it)")
        if body["version"] != VERSION:
            raise ConceptError(f"{stem}.json has version {body['version']!r}; this program reads version {VERSION}")
        vectors = safetensors.numpy.load(storage.read_bytes(stem + ".safetensors"))["vectors"]
        concept = Concept(
            body["name"], vectors, body["layer"], body["model"], body["method"], body["pooling"], body["meta"]
        )
        stored = body["digest"]
    except (ValueError, TypeError, KeyError, safetensors.SafetensorError) as e:
        raise ConceptError(f"the concept file {stem}.json or .safetensors is broken: {type(e).__name__}: {e}") from e
    if digest(concept) != stored:
        raise ConceptError(
            f"{stem}.json and {stem}.safetensors do not belong together: the digest is {digest(concept)}, the file "
            f"says {stored}. A save was cut off, or a file was edited; make the concept again."
        )
    return concept


def _stem(url: str) -> str:
    return re.sub(r"\.(json|safetensors)$", "", url, flags=re.IGNORECASE)


def _vector_bytes(vectors: np.ndarray) -> bytes:
    # One bit pattern for NaN, one for zero and one byte order, so that every machine gets the same digest.
    return np.where(np.isnan(vectors), np.float32("nan"), vectors + np.float32(0)).astype("<f4").tobytes()


def as_json(value: Any) -> Any:
    """JSON values: NumPy scalars as Python's, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def title(identity: Mapping[str, Any]) -> str:
    """A model's identity in words: name, and the beginnings of its digests."""
    if not identity:
        return "a model that the file does not name"
    marks = [f"{k} {str(identity[k])[:12]}" for k in ("digest", "adapter") if identity.get(k)]
    return str(identity.get("name") or "a model") + (f" ({', '.join(marks)})" if marks else "")


def _runs(layers: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    out: list[list[int]] = []
    for n in layers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out) or "none"
