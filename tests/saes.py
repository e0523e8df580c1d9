"""Small SAEs for tests: random ones, and one with a latent that fires exactly where one token stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from curate.concepts.sae import SAE
from curate.models.load import ModelSpec, identity, load_model, load_tokenizer


def random_sae(d: int = 32, h: int = 48, layer: int = 2, seed: int = 0, **form: Any) -> SAE:
    """Weights of spread 1/√d; topk with k = 5 unless `form` says otherwise."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(h, d, generator=g) / d**0.5
    form = {"activation": "topk", "k": 5, **form}
    return SAE(w, 0.1 * torch.randn(h, generator=g), w.clone(), torch.zeros(d), torch.zeros(d), layer=layer,
               name=form.pop("name", "random"), **form)  # fmt: skip


def planted_sae(model: Path, text: str, latent: int, h: int = 24, seed: int = 0) -> SAE:
    """A ReLU SAE at the embeddings (layer 0) of the tiny model in `model`, whose `latent` fires at the one token of
    `text` and nowhere else; the others are random directions with a bias that lets them fire here and there."""
    spec = ModelSpec(str(model))
    (token,) = load_tokenizer(spec)(text, add_special_tokens=False)["input_ids"]
    e = load_model(spec).get_input_embeddings().weight.detach().float()
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(h, e.shape[1], generator=g)
    b = torch.quantile(e @ w.T, 0.97, dim=0).neg()
    w[latent] = e[token] / e[token].dot(e[token])
    others = torch.cat([e[:token], e[token + 1 :]]) @ w[latent]
    highest = float(others.max())
    assert highest < 0.9, "another token is too near; plant another one"
    b[latent] = -(1 + highest) / 2
    d = e.shape[1]
    return SAE(w, b, w.clone(), torch.zeros(d), torch.zeros(d), "relu", 0, "planted", model=identity(spec))
