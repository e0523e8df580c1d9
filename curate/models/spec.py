"""What is asked of a model, as settings: which one, how it generates, which of its layers are tracked.

Plain dataclasses that a config is made of. Loads no torch, so that a config is checked before seconds of imports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from curate.errors import ConfigError, near

Kind = Literal["attention", "mlp", "all", "adapter"]


@dataclass(frozen=True)
class ModelSpec:
    """Which model, in which precision, where. `path` takes the forms of locate.py; `adapter` those of folders.

    `dtype=auto` is bfloat16 on CUDA and float32 elsewhere. `chat_template` is a Jinja text or a file that holds one.
    Without `merge_adapter` the adapter's matrices stay layers of their own beside the weights that they correct.
    """

    path: str
    adapter: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    chat_template: str | None = None
    merge_adapter: bool = True


@dataclass(frozen=True)
class GenerationSpec:
    """How responses are sampled, and by what.

    `temperature=0` takes the likeliest token. `dtype=auto` is bfloat16 on CUDA, float32 elsewhere. `max_model_len`
    counts prompt and response; the model's own limit holds where it is lower. `kv_cache_gb` is for engines on the
    CPU, `gpu_memory_utilization` and `tensor_parallel` for those on GPUs.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = 2048
    max_batch: int = 64
    kv_cache_gb: float = 1.0
    gpu_memory_utilization: float = 0.85
    tensor_parallel: int = 1
    enforce_eager: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_model_len", "max_batch", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"generation.{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"generation.temperature is {self.temperature}; it must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generation.top_p is {self.top_p}; it must be in (0, 1]")
        if self.kv_cache_gb <= 0:
            raise ConfigError(f"generation.kv_cache_gb is {self.kv_cache_gb}; it must be positive")
        if self.engine not in ("auto", "vllm", "transformers"):
            raise ConfigError(f"generation.engine is {self.engine!r}; choose 'auto', 'vllm' or 'transformers'")


@dataclass(frozen=True)
class LayerChoice:
    """Which linear layers of the blocks to track.

    kind: of self-attention, of the MLP, all of a block's, or those of the LoRA adapter.
    first, last: blocks first..last-1, counted from 0; None: from the first, to the last (a concept at layer l reaches
        blocks below l only, so `last` is at most l for it).
    stride: every stride-th of these blocks, beginning with `first`.
    pattern: a regular expression that a layer's name must hold (`re.search`).
    """

    kind: Kind = "attention"
    first: int | None = None
    last: int | None = None
    stride: int = 1
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"the kind of tracked layers is {self.kind!r}{near(self.kind, get_args(Kind))}")
        if self.stride < 1:
            raise ConfigError(f"the stride of the tracked blocks is {self.stride}; it must be at least 1")
        try:
            re.compile(self.pattern or "")
        except re.error as e:
            raise ConfigError(f"the pattern of layer names {self.pattern!r} is no regular expression: {e}") from None
