"""Files of SAEs as projects lay them out, made from one set of weights, and the formulas that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from curate.concepts.sae import SAE, dense, reconstruct
from tests.concepts.test_sae import H, some_sae


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Numbers in every parameter that tell biases and transposes apart."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * (0.3 if "b" in name else 1.0)


def same(sae: SAE, x: Tensor, activations: Tensor, out: Tensor) -> None:
    torch.testing.assert_close(dense(sae, x), activations, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reconstruct(sae, x), out, rtol=1e-10, atol=1e-10)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], weights: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, folder / weights)
    return str(folder)


def parts(seed: int = 0) -> dict[str, Tensor]:
    sae = some_sae(seed=seed)
    return {"e": sae.w_enc, "be": sae.b_enc, "d": sae.w_dec, "bd": sae.b_dec}


def formula(x: Tensor, twice: bool, active: Callable[[Tensor], Tensor], unit: bool = False) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction from the same parts, written out."""
    p = parts()
    pre = (x - p["bd"] * twice) @ p["e"].T + p["be"]
    lengths = p["d"].square().sum(1).sqrt() if unit else torch.ones(H).double()
    r = active(pre * lengths)
    return r, (r / lengths) @ p["d"] + p["bd"]


def top5(pre: Tensor) -> Tensor:
    rank = pre.argsort(-1, descending=True).argsort(-1)
    return torch.where((rank < 5) & (pre > 0), pre, 0.0)
