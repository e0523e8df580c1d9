"""Vector files of other projects: persona vectors (`.pt`) and control vectors (`.gguf`).

In: a URL. Out: vectors [L+1, d] float32 in our layer convention (row l = hidden_states[l]; NaN rows where the file has
none), with what the file says about itself. Knows no model. Nothing here runs code from a file.

**Persona vectors** (github.com/safety-research/persona_vectors): `<trait>_response_avg_diff.pt`, one tensor [L+1, d] in
which row l is the difference of means at hidden_states[l]; `_prompt_avg_diff` pools the prompt, `_prompt_last_diff`
takes its last token. So its rows are ours. (Its steering code counts blocks and so uses row layer+1 for block `layer`.)

**Control vectors**: architecture `controlvector`, one tensor `direction.N` [d] a layer. What N means depends on the
writer. repeng (github.com/vgel/repeng) counts blocks from 0 and takes their output: direction.N = hidden_states[N+1].
llama.cpp's `cvector-generator` names the output of block N-1 direction.N: direction.N = hidden_states[N] (llama.cpp
itself adds direction.N after block N, as repeng means it). The two write `controlvector.layer_count` with different
types, unsigned by repeng and signed by cvector-generator, and that tells them apart. Both leave out a layer at an end,
so the number of layers of the model is not known from the file: `partial_rows`.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from connectors import storage
from curate.errors import ConceptError, near

if TYPE_CHECKING:
    import gguf

# How the activations were pooled when a vector was made: mean over the response, last token of the prompt, last token
# of the whole text (repeng), mean over the prompt, mean over the whole text (cvector-generator).
Pooling = Literal["response_mean", "last_prompt_token", "last_token", "prompt_mean", "text_mean"]
_SUFFIXES: dict[str, Pooling] = {
    "_response_avg_diff": "response_mean",
    "_prompt_avg_diff": "prompt_mean",
    "_prompt_last_diff": "last_prompt_token",
}
_MAX_ROWS = 4096  # a layer number beyond this is a broken file, not a deep model


@dataclass(frozen=True)
class ReadVectors:
    """What a foreign file gives: vectors [L+1, d] float32 and its own account of them."""

    name: str
    vectors: Float[np.ndarray, "rows d"]
    method: str
    pooling: Pooling
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_pt(url: str, key: str | None = None) -> ReadVectors:
    """A tensor [L+1, d], a dict of such tensors (`key` picks one), or a dict {layer: vector [d]}.

    Loaded with `weights_only=True`: a file that holds anything but tensors and plain containers is refused.

    Raises:
        ConceptError: not such a file, other contents, or several entries and no `key`. StorageError: not readable.
    """
    data = read_tensors(url, "Save the bare tensor again: torch.save(vectors, path).")
    name, pooling, assumed = _pt_name(url)
    meta: dict[str, Any] = {"file": _base(url)}
    if assumed:
        meta["pooling_assumed"] = True
    if isinstance(data, Mapping):
        if key is None and data and all(_layer_number(k) is not None for k in data):
            rows = {_layer_number(k): _array(url, v, f"layer {k}").reshape(-1) for k, v in data.items()}
            vectors = _rows(url, {k: v for k, v in rows.items() if k is not None})
            return ReadVectors(name, vectors, "persona_vectors.pt", pooling, {**meta, "partial_rows": True})
        data, picked = _pick(url, data, key)
        meta["key"] = picked
    elif key is not None:
        raise ConceptError(f"{url} holds a single tensor, so it has no entry {key!r}; leave the key out")
    vectors = _array(url, data, "the tensor")
    if vectors.ndim != 2:
        raise ConceptError(
            f"{url} holds a tensor of shape {list(vectors.shape)}; expected [layers + 1, width], in which row l "
            f"belongs to hidden_states[l]"
        )
    return ReadVectors(name, vectors, "persona_vectors.pt", pooling, meta)


def read_tensors(url: str, remedy: str) -> Any:
    """What a PyTorch file holds, if that is tensors and plain containers alone (`weights_only=True`).

    Raises:
        ConceptError: not such a file; `remedy` says how to make one. StorageError: not readable.
    """
    raw = storage.read_bytes(url)
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ConceptError(
            f"{url} cannot be read as tensors alone: it is not a PyTorch file, or it holds other Python objects, which "
            f"are not loaded because they can run code. {remedy}"
        ) from e
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError) as e:
        raise ConceptError(f"{url} is not a whole PyTorch file ({type(e).__name__}: {str(e)[:200]})") from e


def read_gguf(url: str) -> ReadVectors:
    """A control vector of repeng or of llama.cpp's cvector-generator; see the module's docstring for the layers.

    Raises:
        ConceptError: not a GGUF file, cut off, another architecture, or no `direction.N` tensor in it.
    """
    import gguf  # only this one format should pay for it

    path = storage.local_copy(url)
    try:
        reader = gguf.GGUFReader(path)
        arch = _text(reader, "general.architecture")
        hint = _text(reader, "controlvector.model_hint")
        count = reader.get_field("controlvector.layer_count")
        signed = count is not None and count.types[-1] == gguf.GGUFValueType.INT32
        tensors = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(-1) for t in reader.tensors
        }
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, struct.error) as e:
        raise ConceptError(f"{url} is not a whole GGUF file ({type(e).__name__}: {str(e)[:200]})") from e
    if arch != "controlvector":
        raise ConceptError(
            f"{url} is a GGUF file of architecture {arch!r}, not a control vector ('controlvector'). A model file "
            f"belongs under model.path, not under concept."
        )
    shift = 0 if signed else 1
    rows: dict[int, np.ndarray] = {}
    for name, value in tensors.items():
        if not name.startswith("direction."):
            continue
        number = name.removeprefix("direction.")
        if not number.isascii() or not number.isdigit():
            raise ConceptError(f"{url} has a tensor {name!r}; expected direction.N with a layer number N")
        rows[int(number) + shift] = value
    if not rows:
        raise ConceptError(f"{url} holds no direction.N tensor; it has {sorted(tensors)[:5]}")
    meta = {
        "file": _base(url),
        "model_hint": hint,
        "partial_rows": True,
        "written_by": "cvector-generator" if signed else "repeng",
        "layers_in_file": f"direction.N is hidden_states[N{'+1' if shift else ''}]",
    }
    pooling: Pooling = "text_mean" if signed else "last_token"
    return ReadVectors(slug(_base(url).rsplit(".", 1)[0]), _rows(url, rows), "control_vector.gguf", pooling, meta)


def _text(reader: gguf.GGUFReader, name: str) -> str | None:
    found = reader.get_field(name)
    return None if found is None else str(found.contents())


def _pick(url: str, data: Mapping[Any, Any], key: str | None) -> tuple[Any, str]:
    tensors = {str(k): v for k, v in data.items() if isinstance(v, torch.Tensor) and v.ndim == 2}
    if key is None and len(tensors) == 1:
        key = next(iter(tensors))
    if key is None:
        raise ConceptError(
            f"{url} holds {len(tensors)} tensors [layers + 1, width] under {sorted(map(str, data))[:8]}; "
            + ("name one with concept.file.key" if tensors else "expected one at least")
        )
    if key not in tensors:
        raise ConceptError(f"{url} has no tensor [layers + 1, width] under {key!r}{near(key, tensors)}")
    return tensors[key], key


def _rows(url: str, rows: dict[int, np.ndarray]) -> np.ndarray:
    """{row: vector} as an array with NaN where there is none."""
    widths = {len(v) for v in rows.values()}
    if len(widths) != 1:
        raise ConceptError(f"{url}: the vectors of its layers have different widths: {sorted(widths)}")
    if max(rows) > _MAX_ROWS:
        raise ConceptError(f"{url}: layer {max(rows)} is out of all proportion; the file is broken")
    out = np.full((max(rows) + 1, widths.pop()), np.nan, dtype=np.float32)
    for row, value in rows.items():
        out[row] = value
    return out


def _array(url: str, value: Any, what: str) -> np.ndarray:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ConceptError(f"{url}: {what} is {kind}, not a tensor of floating-point numbers")
    return value.detach().to_dense().to(torch.float32).numpy() if value.is_sparse else value.detach().float().numpy()


def _layer_number(key: Any) -> int | None:
    """5, "5", "layer_5", "layer.5", "L5" → 5."""
    if isinstance(key, bool):
        return None
    if isinstance(key, int):
        return key if key >= 0 else None
    m = re.fullmatch(r"(?:layers?[_.]?|L)?(\d{1,6})", str(key))
    return int(m[1]) if m else None


def _pt_name(url: str) -> tuple[str, Pooling, bool]:
    stem = _base(url).rsplit(".", 1)[0]
    for suffix, pooling in _SUFFIXES.items():
        if stem.endswith(suffix) and stem != suffix:
            return slug(stem.removesuffix(suffix)), pooling, False
    return slug(stem), "response_mean", True


def _base(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def slug(text: str) -> str:
    """`text` as a name that can be part of a column's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).lstrip("_-") or "concept"
