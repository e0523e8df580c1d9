"""Load a causal LM, its adapter and its tokenizer from wherever they lie.

In: a ModelSpec. Out: a frozen model in eval mode, a tokenizer, an identity for recipes. Knows no activations.
Whatever the readers of broken files raise (every library its own kinds) becomes a ModelError with their words.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from connectors.storage import local_path
from curate.errors import ConfigError, ModelError, near
from curate.models import adapter as lora
from curate.models.cache import cached_folder
from curate.models.complete import check_complete
from curate.models.digest import file_digest, folder_digest
from curate.models.gguf import dequantise
from curate.models.locate import locate
from curate.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: dict[Literal["float32", "bfloat16", "float16"], torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(device: str) -> torch.device:
    """
    Raises:
        ConfigError: an unknown device, or CUDA where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"model.device is {device!r}; give 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device is {device!r}, but this machine shows no CUDA device; give 'auto' or 'cpu'")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """
    Raises:
        ConfigError: an unknown name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = next((known for name, known in DTYPES.items() if name == dtype), None)
    if found is None:
        raise ConfigError(f"dtype is {dtype!r}{near(dtype, [*DTYPES, 'auto'])}")
    return found


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16", "float16"]:
    """torch.bfloat16 -> "bfloat16", for recipes: precision changes scores in the third digit."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def _source(spec: ModelSpec) -> Path:
    """The .gguf file, or the folder in Hugging Face layout, that `spec.path` names."""
    place = locate(spec.path, spec.revision)
    if place.is_file():
        if place.suffix != ".gguf":
            raise ModelError(f"the model path {spec.path!r} is a file; give its folder, or a .gguf file")
        return place
    if (place / "config.json").is_file():
        return place
    if (place / lora.CONFIG).is_file():
        raise ModelError(f"{spec.path!r} is a PEFT adapter; give its base as model.path and it as model.adapter")
    inside = sorted(place.glob("*.gguf"))
    if len(inside) == 1:
        return inside[0]
    raise ModelError(
        f"the folder {spec.path!r} has no config.json and holds {len(inside)} GGUF files: it is no Hugging Face model"
    )


def resolve(spec: ModelSpec) -> Path:
    """Local folder in Hugging Face layout with the base model's weights (without the adapter).

    Raises:
        ModelError: nothing there, or nothing that is a causal LM.
    """
    source = _source(spec)
    return dequantise(source) if source.is_file() else source


def resolve_adapter(spec: ModelSpec) -> Path | None:
    """Local folder of the adapter, or None.

    Raises:
        ModelError: it is no PEFT adapter with safetensors weights.
    """
    if spec.adapter is None:
        return None
    folder = locate(spec.adapter)
    lora.check_folder(folder)
    return folder


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `chat_template` in place of its own where one is given.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    folder = resolve(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the tokenizer of {spec.path!r} cannot be loaded: {error}") from error
    if spec.chat_template is not None:
        tokenizer.chat_template = _template(spec.chat_template)
    return tokenizer


def _template(value: str) -> str:
    if "{" in value:
        return value
    try:
        return local_path(value).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"model.chat_template is {value!r}, neither a Jinja text nor a readable file") from error


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to fill batches with; any will do, as padding is masked."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0


def context_length(config: PretrainedConfig) -> int:
    """The most tokens the model takes, as its config says; unlimited where it says nothing (ALiBi, state space)."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """The model on its device, adapter merged (or beside the weights), eval mode, no gradients for weights.

    Raises:
        ModelError: it cannot be loaded (the reason is in the message), or the adapter belongs to another base.
        ConfigError: an unknown device or dtype.
    """
    from transformers import AutoModelForCausalLM  # seconds, which tasks that only tokenise should not pay

    device = resolve_device(spec.device)
    dtype = resolve_dtype(spec.dtype, device)
    folder, adapter = resolve(spec), resolve_adapter(spec)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"the folder of {spec.path!r} holds no .safetensors weights. Pickled weights (.bin) are not read: they "
            f"can run code. Load the model where you trust it and call save_pretrained."
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=spec.attention,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"the model {spec.path!r} cannot be loaded: {error}") from error
    model, info = loaded
    check_complete(info, spec.path)
    if adapter is not None:
        model = lora.merge(model, adapter) if spec.merge_adapter else lora.attach(model, adapter)
    model.to(device)  # type: ignore[arg-type]  # the method's wrapper hides its signature
    return model.eval().requires_grad_(False)


def bare_model(spec: ModelSpec) -> PreTrainedModel:
    """The model's modules and shapes without weights (on the device "meta"), to check adapters against: milliseconds.

    Raises:
        ModelError: its config is none of a causal LM.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolve(spec), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"the config of {spec.path!r} cannot be read: {error}") from error


def materialise(spec: ModelSpec) -> Path:
    """A local folder that holds the model with its adapter merged, for engines that load by path.

    Merged rather than served beside the base: requests of both in one batch can get each other's weights.
    """
    folder, adapter = resolve(spec), resolve_adapter(spec)
    if adapter is None:
        return folder

    def build(target: Path) -> None:
        plain = ModelSpec(str(folder), str(adapter), device="cpu")
        load_model(plain).save_pretrained(target)
        load_tokenizer(plain).save_pretrained(target)

    return cached_folder(f"merged-{folder_digest(folder)}-{folder_digest(adapter, lora.CONFIG)}", build)


def identity(spec: ModelSpec) -> dict[str, Any]:
    """What the model is, wherever it lies, as JSON values: {name, layers, width, digest, adapter}.

    Two copies of one model are equal, two trainings of one architecture are not. Precision is not part of it.
    """
    source, folder, adapter = _source(spec), resolve(spec), resolve_adapter(spec)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the config of {spec.path!r} cannot be read: {error}") from error
    text = config.get_text_config()
    kind = (config.architectures or [config.model_type])[0]
    return {
        "name": f"{kind} {text.num_hidden_layers}x{text.hidden_size}",
        "layers": int(text.num_hidden_layers),
        "width": int(text.hidden_size),
        "digest": file_digest(source) if source.is_file() else folder_digest(source),
        "adapter": None if adapter is None else folder_digest(adapter, lora.CONFIG),
    }
