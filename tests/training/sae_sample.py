"""States made of a planted sparse dictionary, as shards on disk."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from curate.training.activation_batches import ActivationBatches, Shard
from curate.training.sae_settings import SaeSettings
from curate.training.sae_trainer import StoredSteps


def dictionary(h: int = 24, d: int = 16) -> torch.Tensor:
    """Rows of length 1."""
    rows = torch.randn(h, d, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=-1)


def planted(n: int, k: int = 2, seed: int = 1, h: int = 24, d: int = 16) -> torch.Tensor:
    """n states, each k rows of `dictionary` with weights 0.5 to 1.5, around a centre that is not 0."""
    draw = torch.Generator().manual_seed(seed)
    at = torch.rand(n, h, generator=draw).topk(k).indices
    weights = torch.zeros(n, h).scatter(1, at, 0.5 + torch.rand(n, k, generator=draw))
    return weights @ dictionary(h, d) + 0.3 + 0.01 * torch.randn(n, d, generator=draw)


def write(folder: Path, states: torch.Tensor, size: int) -> list[Shard]:
    """Shards of `size` states."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for i, part in enumerate(states.split(size)):
        safetensors.torch.save_file({"x": part.contiguous()}, folder / f"{i}.safetensors")
        shards.append(Shard(str(folder / f"{i}.safetensors"), len(part)))
    return shards


def steps(shards: list[Shard], settings: SaeSettings) -> StoredSteps:
    return StoredSteps(
        ActivationBatches(shards, settings.batch_tokens, settings.buffer_tokens, settings.epochs, settings.seed)
    )
