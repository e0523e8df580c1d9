"""LoRA adapters: checked against the base model, then merged into its weights."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from curate.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
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


def _adapted(model: PreTrainedModel, folder: Path) -> PeftModel:
    from peft import PeftModel, get_peft_model_state_dict  # costs a second, and few models have an adapter

    check_folder(folder)
    made_for = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    refusal = f"the adapter {folder} (made for {made_for!r}) does not fit {type(model).__name__}"
    try:
        shapes = _shapes(folder)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is broken: {error}") from error
    _check_shapes(model, shapes, refusal)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except Exception as error:
        raise ModelError(f"{refusal}: {error}") from error
    left_out = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(shapes)
    if left_out:
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
