"""Training settings: what a fine-tune does, as frozen values with their checks. Knows no model and no data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from curate.errors import ConfigError


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters: ΔW = (alpha/√r or alpha/r)·B·A on the linear layers that `targets` names.

    `targets`: all linear layers of the blocks, those of the attention, those of the MLP, or a list of name patterns
    as PEFT takes them.
    """

    r: int = 32
    alpha: float = 64.0
    rslora: bool = True
    dropout: float = 0.0
    targets: Literal["all", "attention", "mlp"] | list[str] = "all"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"training.lora.r is {self.r}; it must be at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"training.lora.alpha is {self.alpha}; it must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"training.lora.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(frozen=True)
class TrainingSpec:
    """One fine-tune. Defaults are paper A's (METHODS §7).

    `batch_size`: rows of one optimizer step, over all workers. `micro_batch`: rows that a worker takes at once; what is
    missing to a step's rows is accumulated. The loss of a step is the mean cross-entropy of all its response tokens.
    `workers`: processes of one training; `strategy` says how several share it. `save_every`: steps between
    checkpoints. `dtype=auto`: bfloat16 on CUDA, float32 elsewhere; an adapter's weights are float32 always.
    """

    method: Literal["lora", "full"] = "lora"
    lora: LoraSpec = field(default_factory=LoraSpec)
    learning_rate: float = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 16
    micro_batch: int = 4
    epochs: int = 1
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    workers: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    save_every: int = 100
    log_every: int = 5

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch", "epochs", "workers", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"training.seed is {self.seed}; it must be at least 0 and below 2³²")
        if not self.learning_rate > 0:
            raise ConfigError(f"training.learning_rate is {self.learning_rate}; it must be positive")
        if self.batch_size % self.workers:
            raise ConfigError(
                f"training.batch_size={self.batch_size} cannot be shared evenly by training.workers={self.workers}; "
                f"choose a multiple"
            )

    @property
    def accumulation(self) -> tuple[int, int]:
        """(rows a worker takes at once, times before a step): their product × workers is `batch_size`."""
        share = self.batch_size // self.workers
        micro = max(n for n in range(1, min(self.micro_batch, share) + 1) if share % n == 0)
        return micro, share // micro

    @property
    def product(self) -> str:
        """The folder of what a training makes: "adapter" (PEFT) or "model" (Hugging Face)."""
        return "adapter" if self.method == "lora" else "model"
