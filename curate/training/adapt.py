"""The model of a training: what of it learns. A LoRA adapter beside frozen weights, or all weights.

In: a ModelSpec and a TrainingSpec. Out: a model in float32 or bfloat16 whose trained weights are float32 always.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curate.errors import ConfigError
from curate.models.load import ModelSpec, load_model
from curate.models.tracked import LayerChoice, is_linear, tracked_layers
from curate.training.spec import LoraSpec, TrainingSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def causal_lm(model: Any) -> PreTrainedModel:
    """The causal LM within an adapter's wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_for_training(spec: ModelSpec, training: TrainingSpec) -> Any:
    """The model on the CPU, ready to be trained: a PeftModel (method lora), or the model with all weights float32.

    The adapter's first values depend on `training.seed` alone.

    Raises:
        ConfigError: targets that match nothing; LoRA on a model that has an adapter already.
        ModelError: the model cannot be loaded.
    """
    if training.dtype == "auto":
        raise ConfigError("training.dtype is 'auto' where it must be decided; give float32 or bfloat16")
    if training.method == "full":
        model = load_model(replace(spec, dtype="float32", device="cpu"))
        return model.requires_grad_(True)
    if spec.adapter is not None:
        raise ConfigError(
            f"model.adapter={spec.adapter!r}: an adapter is trained on a base model, not on another adapter. Train "
            f"with training.method=full, or save the merged model and give it as model.path."
        )
    # FSDP cuts all weights of a block together, so that they must be of one precision.
    dtype = "float32" if training.strategy == "fsdp" and training.workers > 1 else training.dtype
    return _with_adapter(load_model(replace(spec, dtype=dtype, device="cpu")), spec.path, training)


def _with_adapter(model: PreTrainedModel, path: str, training: TrainingSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = training.lora
    targets = lora.targets if isinstance(lora.targets, list) else _names(model, lora)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with seeded(training.seed):
            tuned = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)})
        raise ConfigError(
            f"training.lora.targets={lora.targets!r} does not fit {type(model).__name__}: {error} Its linear layers "
            f"are {', '.join(names)}."
        ) from error
    tuned.peft_config["default"].base_model_name_or_path = path
    return tuned


def _names(model: PreTrainedModel, lora: LoraSpec) -> list[str]:
    """The layers' last names where these say it all (q_proj, …), as engines like them; else their full names."""
    full = {layer.name for layer in tracked_layers(model, LayerChoice(lora.targets))[0]}  # type: ignore[arg-type]
    last = {name.rpartition(".")[2] for name in full}
    meant = {name for name, module in model.named_modules() if name.rpartition(".")[2] in last and is_linear(module)}
    return sorted(last if meant == full else full)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The process' random generators at `seed` for the block, and afterwards as they were."""
    kept = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
