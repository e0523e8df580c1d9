"""Tiny models in full float64, random SAEs, and P(r) = ⟨s, ∇_θ₂ L(row; r)⟩ of dense activations, written out plainly.

The oracles know nothing of the code under test: a whole Hugging Face forward in which a hook replaces the layer's
state, one row at a time without padding, every latent of every token a variable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from curate.concepts.sae import SAE
from curate.corpus.render import Rendered
from curate.curvature.test_vector import Dense, TestVector
from curate.models.tracked import LayerChoice
from tests.scoring.directional.oracle import random_vector
from tests.tiny import tiny_model

LAYER = 1
# A usual row, one with text behind its end, one without a prompt, one of a token each.
ROWS = [
    Rendered([5, 9, 11, 4, 8, 8, 21, 30, 7, 12], 4, 9, 10),
    Rendered([15, 29, 31, 40, 18, 8, 99, 98, 97], 1, 5, 6),
    Rendered([5, 9, 11, 4], 0, 3, 4),
    Rendered([7, 70, 71], 1, 2, 3),
]


def exact_model(kind: str = "llama", **settings):
    """In float64 throughout: Hugging Face's RMSNorm rounds to float32 in any precision, torch's does not."""
    model = tiny_model(kind, **settings).double()
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight.data = module.weight.data
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, norm)
    return model.eval().requires_grad_(False)


def adapted(model, targets: Sequence[str] = ("q_proj", "v_proj", "down_proj")):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
        wrapped = get_peft_model(model, settings)
    return wrapped.get_base_model().to(model.dtype).eval().requires_grad_(False)


def random_sae(activation: str = "topk", latents: int = 20, d: int = 32, layer: int = LAYER, **settings) -> SAE:
    """About as many latents of a token active as not, but for TopK: 3."""
    maker = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=maker, dtype=torch.float64)

    if activation == "topk":
        settings.setdefault("k", 3)
    if activation == "jumprelu":
        settings.setdefault("threshold", normal(latents).abs())
    return SAE(
        w_enc=normal(latents, d), b_enc=normal(latents, scale=0.1), w_dec=normal(latents, d, scale=0.3),
        b_pre=normal(d, scale=0.1), b_dec=normal(d, scale=0.1), activation=activation, layer=layer, name="tiny",
        **settings,
    )  # fmt: skip


def vector_above(model, names: Sequence[str] = ("a", "b"), kind: str = "all", layer: int = LAYER, **settings):
    return random_vector(model, names, LayerChoice(kind=kind, first=layer), **settings)


def dense_latents(model, sae: SAE, row: Rendered) -> Tensor:
    """r [end, latents] of what the model itself has at the layer."""
    ids = torch.tensor([row.input_ids[: row.end]])
    x = model(ids, output_hidden_states=True).hidden_states[sae.layer][0]
    pre = (x * sae.scale - sae.b_pre) @ sae.w_enc.T + sae.b_enc
    if sae.activation == "topk":
        keep = pre >= pre.sort(-1, descending=True).values[:, sae.k - 1 : sae.k]
    else:
        keep = pre > (0 if sae.threshold is None else sae.threshold)
    return torch.where(keep & (pre > 0), pre, 0.0)


def loss_of(model, sae: SAE, row: Rendered, r: Tensor, weights: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """L(row; r) at `weights`, the model being given x̃(r) as the layer's state."""
    x = (r @ sae.w_dec + sae.b_dec) / sae.scale
    blocks = next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))

    def replace(module, args, kwargs):
        return ((x[None], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x[None]})

    handle = blocks[sae.layer].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            ids = torch.tensor([row.input_ids[: row.end]])
            logits = functional_call(model, weights, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
    finally:
        handle.remove()
    first = max(row.start, 1)
    return F.cross_entropy(logits[first - 1 : row.end - 1], ids[0, first : row.end], reduction=reduction)


def weights_and_direction(model, vector: TestVector, query: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tracked weights and s, in float64, as they lie in the modules."""
    weights, s = {}, {}
    for layer in vector.layers:
        module = model.get_submodule(layer.name)
        part = vector.blocks[layer.name]
        block = (
            part.values[query].double() if isinstance(part, Dense) else part.u[query].double() @ part.v[query].double()
        )
        weights[f"{layer.name}.weight"] = module.weight.detach()
        s[f"{layer.name}.weight"] = block.T if isinstance(module, Conv1D) else block
    return weights, s


def projection(model, sae, row, r, vector, query, reduction="mean") -> Tensor:
    """P(r) by autograd over the weights, with a graph back to r."""
    weights, s = weights_and_direction(model, vector, query)
    leaves = {name: weight.clone().requires_grad_(True) for name, weight in weights.items()}
    loss = loss_of(model, sae, row, r, leaves, reduction)
    gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    return sum((s[name] * part).sum() for name, part in zip(leaves, gradient, strict=True))


def slope_of_projection(model, sae, row, r, vector, query, reduction="mean") -> Tensor:
    """∇_r P, dense [end, latents]: a double backward by plain autograd."""
    r = r.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(projection(model, sae, row, r, vector, query, reduction), r)
    return slope


def expected(model, sae, row, vector, reduction="mean") -> Tensor:
    """The influence in our sign, dense [q, end, latents]."""
    r = dense_latents(model, sae, row)
    queries = range(len(vector.names))
    return torch.stack([-slope_of_projection(model, sae, row, r, vector, q, reduction) * r for q in queries])


def densified(row, latents: int) -> tuple[np.ndarray, np.ndarray]:
    """(activations [t, latents], influence [q, t, latents]) of a RowLatents."""
    q, t, _ = row.influence.shape
    activations, influence = np.zeros((t, latents)), np.zeros((q, t, latents))
    at = np.arange(t)[:, None]
    np.add.at(activations, (at, row.indices), row.activations)
    for one, part in zip(influence, row.influence, strict=True):
        np.add.at(one, (at, row.indices), part)
    return activations, influence
