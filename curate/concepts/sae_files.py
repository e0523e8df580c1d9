"""Files of sparse autoencoders: our own, in SAELens' layout, and those of SAELens, sparsify and dictionary_learning.

In: the URL of a folder (or of one of its files). Out: an `SAE` in our form and layer numbers; see saelens.py and
sae_foreign.py for each project's conventions. Knows no model. Nothing here runs code from a file.

Our own files are SAELens' (`cfg.json`, `sae_weights.safetensors`), with our facts in the config's metadata; SAELens
reads them. The config is written last and holds the SAE's digest, so half a pair is known as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import safetensors
import safetensors.torch
from torch import Tensor

from connectors import storage
from curate.concepts.formats import read_tensors, slug
from curate.concepts.sae import SAE, digest, folded
from curate.concepts.sae_foreign import from_dictionary_learning, from_sparsify
from curate.concepts.sae_read import Read
from curate.concepts.saelens import CONFIG, OURS, WEIGHTS, from_saelens, to_saelens
from curate.errors import ConceptError, near

Format = Literal["auto", "saelens", "sparsify", "dictionary_learning"]
_FILES = {WEIGHTS: "saelens", "sae.safetensors": "sparsify", "ae.pt": "dictionary_learning"}


def save(url: str, sae: SAE) -> str:
    """Write the folder `url`: weights, then config; each atomically. Returns the URL of the config.

    What is written is `folded(sae)`: a scale goes into the weights, and `load` gives back exactly that.

    Raises:
        StorageError: the place cannot be written.
    """
    url = url.rstrip("/")
    config, tensors = to_saelens(folded(sae))
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    storage.write_atomic(storage.join(url, WEIGHTS), safetensors.torch.save(tensors))
    storage.write_atomic(storage.join(url, CONFIG), text + "\n")
    return storage.join(url, CONFIG)


def load(
    url: str,
    format: Format = "auto",
    layer: int | None = None,
    name: str | None = None,
    scale: float | None = None,
) -> SAE:
    """The SAE in the folder `url`, in float32 (float64 where the file has that), on the CPU.

    Args:
        format: "auto" goes by the files that there are. layer: as in `hidden_states`, where the file does not say.
        name: another than the file's or folder's. scale: what states are multiplied by before the SAE, for files of
            SAEs that were trained on scaled states and do not hold the factor (√d / mean ‖x‖ in SAELens).

    Raises:
        ConceptError: no such files, a broken one, half a pair, a form that is not read, a layer that is not known or
            another than the file's, NaN weights. StorageError: nothing there, or not readable.
    """
    url = url.rstrip("/")
    folder, base = url, url.rpartition("/")[2]
    if base in (CONFIG, *_FILES):
        folder = url.rpartition("/")[0]
    kind = _kind(folder, format)
    title = folder.rpartition("/")[2]
    config, read = _READERS[kind](folder, title)
    if scale is not None:
        read = replace(read, unscaled=False)
    if read.unscaled:
        raise ConceptError(
            f"the SAE {folder} was trained on states scaled to one mean length, and its file does not hold the factor. "
            f"Give it as scale=… (√d / mean ‖x‖ over the training's states), or scale=1 if it is in the weights already"
        )
    metadata = config.get("metadata")
    own = metadata.get(OURS) if isinstance(metadata, Mapping) else None
    if isinstance(own, Mapping):
        return _own(folder, read, own, name, layer)
    meta = {
        **read.meta,
        "file": title,
        "hook": read.place,
        "before_final_norm": bool(read.hook and read.hook.after_block),
    }
    return _sae(read, _layer(folder, read, layer), name or slug(title), {}, meta, 1.0 if scale is None else scale)


def _own(folder: str, read: Read, own: Mapping[str, Any], name: str | None, layer: int | None) -> SAE:
    try:
        sae = _sae(read, own["layer"], own["name"], own["model"], own["meta"])
        stored = own["digest"]
    except (KeyError, TypeError) as e:
        raise ConceptError(f"{folder}/{CONFIG} is broken: {type(e).__name__}: {e}") from e
    if digest(sae) != stored:
        raise ConceptError(
            f"{folder}/{CONFIG} and {WEIGHTS} do not belong together: the digest is {digest(sae)}, the config says "
            f"{stored}. A save was cut off, or one file was changed; make the SAE again, or, if the weights were "
            f"trained on, take {OURS!r} out of the config's metadata."
        )
    if layer is not None and layer != sae.layer:
        raise ConceptError(f"the SAE {sae.name!r} ({folder}) is of layer {sae.layer}, but layer={layer} is given")
    return replace(sae, name=name) if name else sae


def _sae(
    read: Read, layer: int, name: str, model: Mapping[str, Any], meta: Mapping[str, Any], scale: float = 1.0
) -> SAE:
    return SAE(
        read.w_enc,
        read.b_enc,
        read.w_dec,
        read.b_pre,
        read.b_dec,
        read.activation,
        layer,
        name,
        read.k,
        read.threshold,
        scale,
        read.normalise,
        model,
        meta,
    )


def _layer(folder: str, read: Read, given: int | None) -> int:
    if read.hook is None:
        if given is None:
            said = f"names {read.place!r}, no" if read.place else "does not name a"
            raise ConceptError(
                f"the SAE {folder} {said} place in the residual stream between blocks, so its layer is not known. Give "
                f"it as layer=… (as in hidden_states: N+1 for the output of block N, counted from 0)"
            )
        return given
    if given not in (None, read.hook.layer):
        raise ConceptError(
            f"the SAE {folder} reads {read.hook.name}, which is layer {read.hook.layer}, but layer={given} is given"
        )
    return read.hook.layer


def _kind(folder: str, format: str) -> str:
    if format not in get_args(Format):
        raise ConceptError(f"there is no format of SAE files {format!r}{near(format, get_args(Format))}")
    if format != "auto":
        return format
    for file, kind in _FILES.items():
        if storage.exists(storage.join(folder, file)):
            return kind
    if storage.exists(storage.join(folder, CONFIG)):
        raise ConceptError(f"{folder} has a {CONFIG} and no weights ({WEIGHTS}, sae.safetensors): fetch it whole")
    raise ConceptError(
        f"{folder} is no folder of an SAE: it has neither {', '.join(_FILES)}. Where a folder holds one SAE a layer, "
        f"give the folder of one layer"
    )


def _read_saelens(folder: str, title: str) -> tuple[Mapping[str, Any], Read]:
    config = _config(folder, CONFIG)
    return config, from_saelens(config, _safetensors(storage.join(folder, WEIGHTS)), folder)


def _read_sparsify(folder: str, title: str) -> tuple[Mapping[str, Any], Read]:
    tensors = _safetensors(storage.join(folder, "sae.safetensors"))
    return {}, from_sparsify(_config(folder, CONFIG), tensors, title, folder)


def _read_dictionary_learning(folder: str, title: str) -> tuple[Mapping[str, Any], Read]:
    url = storage.join(folder, "ae.pt")
    tensors = read_tensors(url, "Save its state_dict() alone: torch.save(ae.state_dict(), path).")
    if not isinstance(tensors, Mapping):
        raise ConceptError(f"{url} holds {type(tensors).__name__}, expected the state of a dictionary by name")
    config = _config(folder, "config.json") if storage.exists(storage.join(folder, "config.json")) else {}
    return {}, from_dictionary_learning(config, tensors, folder)


_READERS = {
    "saelens": _read_saelens,
    "sparsify": _read_sparsify,
    "dictionary_learning": _read_dictionary_learning,
}


def _config(folder: str, file: str) -> Mapping[str, Any]:
    url = storage.join(folder, file)
    if not storage.exists(url):
        raise ConceptError(f"{folder} has weights of an SAE and no {file}: it was not written to its end, or not whole")
    try:
        body = json.loads(storage.read_text(url))
    except ValueError as e:
        raise ConceptError(f"{url} is broken: {e}") from e
    if not isinstance(body, Mapping):
        raise ConceptError(f"{url} is broken: it holds {type(body).__name__}, expected names and values")
    return body


def _safetensors(url: str) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(str(storage.local_copy(url)), framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (no mapping)
    except (safetensors.SafetensorError, ValueError, OSError) as e:
        raise ConceptError(f"{url} is not a whole safetensors file ({type(e).__name__}: {str(e)[:200]})") from e
