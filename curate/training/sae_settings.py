"""SAE training settings: what `curate sae` may be told, as frozen values with checks. Knows no model and no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from curate.errors import ConfigError

# Weight of the sparsity term where none is given; each in the units of its own term (see sae_loss.py).
SPARSITY = {"topk": 0.0, "relu": 0.05, "jumprelu": 1e-3}


@dataclass(frozen=True)
class SaeSettings:
    """See conf/sae/default.yaml for what each setting does.

    Raises:
        ConfigError: on construction, for a value out of its range, or settings that exclude each other.
    """

    layers: list[int] | Literal["middle", "all"] = "middle"
    latents: int = 2048
    activation: Literal["topk", "relu", "jumprelu"] = "topk"
    k: int = 64
    sparsity: float | None = None
    bandwidth: float = 1.0
    threshold: float = 1.0
    tokens: Literal["all", "response"] = "all"
    epochs: int = 2
    batch_tokens: int = 2048
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.2
    max_grad_norm: float = 1.0
    error: Literal["token", "batch"] = "token"
    bias: Literal["median", "mean"] = "median"
    auxiliary: float = 1 / 32
    auxiliary_k: int | None = None
    dead_after: int | None = None
    orthogonality: float = 0.0
    task: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    store_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    buffer_tokens: int = 65536
    save_every: int = 200
    log_every: int = 10
    held_out: float = 0.02
    held_out_rows: int = 64
    metric: str | None = None
    name: str = "sae"
    seed: int = 0

    def __post_init__(self) -> None:
        least: dict[str, float] = {
            "latents": 1, "k": 1, "epochs": 1, "batch_tokens": 1, "buffer_tokens": 1, "save_every": 1, "log_every": 1,
            "auxiliary_k": 1, "dead_after": 1, "held_out_rows": 1, "seed": 0, "weight_decay": 0, "warmup": 0,
            "decay": 0, "max_grad_norm": 0, "auxiliary": 0, "orthogonality": 0, "task": 0, "sparsity": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ConfigError(f"sae.{name} is {value}; it must be at least {smallest:g}")
        for name in ("learning_rate", "bandwidth", "threshold"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"sae.{name} is {getattr(self, name)}; it must be above 0")
        if self.warmup + self.decay > 1:
            raise ConfigError(
                f"sae.warmup={self.warmup:g} and sae.decay={self.decay:g} are shares of the steps, together at most 1"
            )
        if not 0 < self.held_out < 1:
            raise ConfigError(f"sae.held_out is {self.held_out}; it is a share of the rows, above 0 and below 1")
        if self.activation == "topk" and self.k > self.latents:
            raise ConfigError(f"sae.k is {self.k}, more than sae.latents={self.latents}; k is at most that")
        if isinstance(self.layers, list) and not self.layers:
            raise ConfigError("sae.layers is an empty list; name layers, or 'middle' or 'all'")

    @property
    def sparsity_weight(self) -> float:
        """Of the sparsity term."""
        return SPARSITY[self.activation] if self.sparsity is None else self.sparsity

    def chosen_layers(self, blocks: int) -> list[int]:
        """The layers to train at, in a model of `blocks` blocks, in order. All: 1..L-1, where both an encoder and a
        computation that reads its output remain.

        Raises:
            ConfigError: a layer that the model does not have, or at which nothing is left to compute.
        """
        if self.layers == "middle":
            return middle_half(blocks)
        if self.layers == "all":
            return list(range(1, blocks)) or [0]
        for layer in self.layers:
            if not 0 <= layer < blocks:
                raise ConfigError(
                    f"sae.layers holds {layer}, but in a model of {blocks} blocks an SAE can be inserted at the layers "
                    f"0 (the embeddings) to {blocks - 1}; after the final norm no block follows"
                )
        return sorted(set(self.layers))


def middle_half(blocks: int) -> list[int]:
    """⌈L/4⌉..⌊3L/4⌋ (METHODS §5); L ≥ 1 blocks. Of a model of one block, the layer that it reads."""
    return list(range(-(-blocks // 4), 3 * blocks // 4 + 1)) or [0]
