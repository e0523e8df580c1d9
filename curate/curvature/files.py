"""Factor files: a folder with one safetensors file a layer, and an index written last.

In: factors. Out: the same again. Knows no model and no corpus, but what the index says of them.

    <url>/layers/<layer>.safetensors   eigenvalues [out, in], q_out [out, out]
    <url>/inputs/<reads>.safetensors   q_in [in, in], once for all the layers that read one input
    <url>/factors.json                 what they were made from; there only when everything else is
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from connectors import storage
from curate.curvature.ekfac import Factor
from curate.curvature.fisher import CurvatureSpec
from curate.errors import CurvatureError
from curate.models.tracked import Coverage, LayerChoice, TrackedLayer

FORMAT = "curate.factors"
VERSION = 1
INDEX = "factors.json"


@dataclass(frozen=True)
class FactorIndex:
    """What lies in a folder of factors. `digest` of the recipe; `model` the identity of the model that was fitted;
    `rows`, `tokens` that were summed."""

    digest: str
    model: Mapping[str, Any]
    spec: CurvatureSpec
    layers: tuple[TrackedLayer, ...]
    coverage: Coverage
    rows: int
    tokens: int


def save_factor(url: str, factor: Factor) -> None:
    """Write the factor's file below `url`, whole or not at all. Q_A is written by the layer that its group is named
    after, for all of them.

    Raises:
        StorageError: the place cannot be written.
    """
    layer = factor.layer
    own = {"eigenvalues": factor.eigenvalues, "q_out": factor.q_out}
    _write(_layer_url(url, layer), {key: part for key, part in own.items() if part is not None})
    if factor.q_in is not None and layer.name == layer.reads:
        _write(_input_url(url, layer), {"q_in": factor.q_in})


def load_factor(url: str, layer: TrackedLayer, kind: str) -> Factor:
    """The factor of `layer`, of a folder that holds factors of `kind`.

    Raises:
        CurvatureError: a file is broken, incomplete or of another shape. StorageError: it is not there.
    """
    if kind == "identity":
        return Factor(layer, "identity")
    shapes = {"eigenvalues": (layer.out, layer.width)}
    if kind == "diagonal":
        return Factor(layer, "diagonal", _read(url, _layer_url(url, layer), shapes)["eigenvalues"])
    parts = _read(url, _layer_url(url, layer), {**shapes, "q_out": (layer.out, layer.out)})
    q_in = _read(url, _input_url(url, layer), {"q_in": (layer.width, layer.width)})["q_in"]
    return Factor(layer, "kfac" if kind == "kfac" else "ekfac", parts["eigenvalues"], parts["q_out"], q_in)


def save_index(url: str, index: FactorIndex) -> None:
    """Write `<url>/factors.json`, after all the factors: with it the folder is whole."""
    body = {"format": FORMAT, "version": VERSION, **asdict(index)}
    storage.write_atomic(storage.join(url, INDEX), json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def load_index(url: str, model: Mapping[str, Any] | None = None) -> FactorIndex:
    """The index of the folder `url`, every file of it there.

    Args:
        model: identity of the model whose gradients will be solved for.

    Raises:
        CurvatureError: no index or a broken one; a layer's file is missing; the factors are of another model.
        StorageError: the place cannot be read.
    """
    where = storage.join(url, INDEX)
    if not storage.exists(where):
        raise CurvatureError(
            f"{url} holds no finished factors: there is no {INDEX}, which is written last. Run the fit again."
        )
    try:
        body = json.loads(storage.read_text(where))
        if body.get("format") != FORMAT or body.get("version") != VERSION:
            raise CurvatureError(
                f"{where} has the format {body.get('format')!r}, version {body.get('version')!r}; this program reads "
                f"{FORMAT!r}, version {VERSION}. {_remedy(url)}"
            )
        spec = {**body["spec"], "layers": LayerChoice(**body["spec"]["layers"])}
        index = FactorIndex(
            body["digest"],
            body["model"],
            CurvatureSpec(**spec),
            tuple(TrackedLayer(**layer) for layer in body["layers"]),
            Coverage(**{**body["coverage"], "warnings": tuple(body["coverage"]["warnings"])}),
            int(body["rows"]),
            int(body["tokens"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise CurvatureError(f"{where} is broken: {type(e).__name__}: {e}. {_remedy(url)}") from e
    have = {f.name for f in storage.list_files(url)}
    missing = [name for name in _files(index) if name not in have]
    if missing:
        raise CurvatureError(
            f"{url} is incomplete: {len(missing)} files are missing, such as {missing[0]}. {_remedy(url)}"
        )
    if model is not None:
        check_model(url, index.model, model)
    return index


def check_model(url: str, fitted: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """
    Raises:
        CurvatureError: `fitted` and `model` are two models, by digest or adapter; names both.
    """
    if any(fitted.get(key) != model.get(key) for key in ("digest", "adapter")):
        raise CurvatureError(
            f"the factors in {url} are of {_title(fitted)}, the gradients of {_title(model)}: curvature of one model "
            f"means nothing in another. Fit factors for this model; if that is what this folder should hold, remove it."
        )


def _title(identity: Mapping[str, Any]) -> str:
    adapter = f" with the adapter {identity['adapter'][:12]}" if identity.get("adapter") else ""
    return f"{identity.get('name', 'a model')} (digest {str(identity.get('digest'))[:12]}){adapter}"


def _files(index: FactorIndex) -> list[str]:
    if index.spec.kind == "identity":
        return []
    files = [f"layers/{layer.name}.safetensors" for layer in index.layers]
    if index.spec.kind != "diagonal":
        files += [f"inputs/{reads}.safetensors" for reads in dict.fromkeys(layer.reads for layer in index.layers)]
    return files


def _layer_url(url: str, layer: TrackedLayer) -> str:
    return storage.join(url, "layers", f"{layer.name}.safetensors")


def _input_url(url: str, layer: TrackedLayer) -> str:
    return storage.join(url, "inputs", f"{layer.reads}.safetensors")


def _write(url: str, tensors: Mapping[str, Tensor]) -> None:
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    storage.write_atomic(url, safetensors.torch.save(plain))


def _remedy(folder: str) -> str:
    return f"Remove the folder {folder} and run the same command again; the factors are then fitted anew."


def _read(folder: str, url: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(storage.read_bytes(url))
    except safetensors.SafetensorError as e:
        raise CurvatureError(f"the factor file {url} is broken: {e}. {_remedy(folder)}") from e
    for key, shape in shapes.items():
        if key not in tensors:
            raise CurvatureError(
                f"the factor file {url} holds no {key}; it is of another kind of curvature. {_remedy(folder)}"
            )
        if tensors[key].shape != shape:
            raise CurvatureError(
                f"the factor file {url} has {key} of the shape {tuple(tensors[key].shape)}, not {shape}. "
                f"{_remedy(folder)}"
            )
    return tensors
