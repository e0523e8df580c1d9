"""LoRA adapters: checked against the base model, then merged into its weights, or worn for a while and taken off."""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from curate.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BASE = "base.json"  # written by this library's training: what the base model is
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


def check_folder(folder: Path) -> None:
    """
    Raises:
        ModelError: `folder` is not a PEFT adapter with safetensors weights.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"the adapter {folder} has no {CONFIG}; give the folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"the adapter {folder} has no {WEIGHTS}. Pickled weights (.bin) are not read: they can run code. "
            f"Load it where you trust it and save it again with PEFT."
        )


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with the adapter's update added to its weights (its own tensors are changed).

    Raises:
        ModelError: the adapter was made for another base: a module is not there, has another shape, or is left out.
    """
    return _adapted(model, folder).merge_and_unload()


def attach(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with the adapter's matrices as linear layers beside the weights that they correct.

    Raises:
        ModelError: as `merge`.
    """
    return cast("PreTrainedModel", _adapted(model, folder).get_base_model())


class Wardrobe:
    """A model that wears one adapter at a time, or none. Its own weights are never changed, so that the base model
    after an adapter is the base model before it, to the last bit."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._folder: Path | None = None
        self._worn: PeftModel | None = None

    def wear(self, folder: Path | None) -> None:
        """Put on the adapter in `folder` (None: nothing); what was worn before is taken off.

        Raises:
            ModelError: as `merge`; the model then wears nothing.
        """
        if folder == self._folder:
            return
        if self._worn is not None:
            worn, self._worn, self._folder = self._worn, None, None
            cast(Any, worn).unload()  # puts the original layers back
            del worn
            gc.collect()
        if folder is not None:
            self._worn = _adapted(self.model, folder)
            self._worn.requires_grad_(False).eval()
            self._folder = folder


def config_of(folder: Path) -> dict[str, Any]:
    """The adapter's settings as PEFT wrote them.

    Raises:
        ModelError: they are no JSON object.
    """
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is broken: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{folder / CONFIG} holds no settings; give the folder that PEFT's save_pretrained wrote")
    return found


def rank(folder: Path) -> int:
    """The largest rank among the adapter's matrices.

    Raises:
        ModelError: it is no LoRA adapter.
    """
    config = config_of(folder)
    if not isinstance(config.get("r"), int):
        raise ModelError(f"the adapter {folder} is of the kind {config.get('peft_type')!r}; only LoRA can be used")
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def check_fits(model: PreTrainedModel, folder: Path, base: Mapping[str, Any] | None = None) -> None:
    """Check an adapter without its weights; `model` may lie on the device "meta". `base` is the model's identity.

    Raises:
        ModelError: the adapter was trained on another base, as its shapes show, or as it says itself.
    """
    check_folder(folder)
    rank(folder)
    if base is not None and (folder / BASE).is_file():
        try:
            said = dict(json.loads((folder / BASE).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{folder / BASE} is broken: {error}") from error
        other = next((k for k in ("digest", "adapter") if k in said and said[k] != base.get(k)), None)
        if other is not None:
            raise ModelError(
                f"the adapter {folder} was trained on another model ({said.get('name')}, {other} {said[other]}) than "
                f"the one that it is to be put on ({base.get('name')}, {other} {base.get(other)}); give its own base "
                f"as model.path"
            )
    _check_shapes(model, *_told(model, folder))


def _told(model: PreTrainedModel, folder: Path) -> tuple[dict[str, list[int]], str]:
    """The shapes in the adapter's file, and how an error of theirs begins."""
    made_for = config_of(folder).get("base_model_name_or_path")
    refusal = f"the adapter {folder} (made for {made_for!r}) does not fit {type(model).__name__}"
    try:
        return _shapes(folder), refusal
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is broken: {error}") from error


def _adapted(model: PreTrainedModel, folder: Path) -> PeftModel:
    from peft import PeftModel, get_peft_model_state_dict  # costs a second, and few models have an adapter

    check_folder(folder)
    shapes, refusal = _told(model, folder)
    _check_shapes(model, shapes, refusal)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except Exception as error:
        raise ModelError(f"{refusal}: {error}") from error
    left_out = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(shapes)
    if left_out:
        cast(Any, adapted).unload()
        raise ModelError(f"{refusal}: it has no weights for {len(left_out)} modules, such as {min(left_out)!r}")
    return adapted


def _shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / WEIGHTS, framework="pt") as f:
        return {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118 (not a dict)


def _check_shapes(model: PreTrainedModel, shapes: dict[str, list[int]], refusal: str) -> None:
    for key, shape in shapes.items():
        match = _FACTOR.match(key)
        if not match:
            continue
        try:
            weight = cast(Tensor, model.get_submodule(match["module"]).weight)
        except AttributeError:
            raise ModelError(f"{refusal}: the model has no module {match['module']!r}") from None
        size = shape[1] if match["side"] == "A" else shape[0]
        if size not in weight.shape:  # A is [rank, in], B is [out, rank]; GPT-2 keeps its weights transposed
            raise ModelError(f"{refusal}: {key} has the shape {shape}, the model's weight {tuple(weight.shape)}")
