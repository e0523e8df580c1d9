"""Test vectors of random numbers, and -⟨s, ∇L_i⟩ by autograd over the weights, one unpadded row at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from curate.corpus.render import Rendered
from curate.curvature.test_vector import Dense, LowRank, TestVector
from curate.models.tracked import LayerChoice, tracked_layers


def random_vector(
    model, names: Sequence[str] = ("f",), choice: LayerChoice | None = None, seed: int = 0, rank: int | None = None
) -> TestVector:
    """Blocks of independent normal numbers; with `rank`, products of two thin ones."""
    layers, _ = tracked_layers(model, choice or LayerChoice(kind="all"))
    maker = torch.Generator().manual_seed(seed)
    q, blocks = len(names), {}
    for layer in layers:
        if rank is None:
            blocks[layer.name] = Dense(torch.randn((q, layer.out, layer.width), generator=maker))
        else:
            u = torch.randn((q, layer.out, rank), generator=maker)
            blocks[layer.name] = LowRank(u, torch.randn((q, rank, layer.width), generator=maker))
    return TestVector(tuple(names), tuple(layers), blocks, {"made": "for a test"})


def exact(
    model, vector: TestVector, rows: Sequence[Rendered], reduction: str = "mean"
) -> tuple[np.ndarray, np.ndarray]:
    """(scores [n, q], contributions of the blocks [n, q, blocks]) in float64."""
    model = copy.deepcopy(model).double()
    weights = [model.get_submodule(layer.name).weight.requires_grad_(True) for layer in vector.layers]
    found = np.zeros((len(rows), len(vector.names), model.config.num_hidden_layers))
    for i, row in enumerate(rows):
        logits = model(torch.tensor([row.input_ids])).logits
        first = max(row.start, 1)
        target = torch.tensor(row.input_ids[first : row.end])
        loss = F.cross_entropy(logits[0, first - 1 : row.end - 1], target, reduction=reduction)
        for layer, gradient in zip(vector.layers, torch.autograd.grad(loss, weights), strict=True):
            if isinstance(model.get_submodule(layer.name), Conv1D):  # keeps its weight transposed
                gradient = gradient.T
            s = vector.blocks[layer.name].dense().double()
            found[i, :, layer.block] -= (s * gradient).sum((1, 2)).numpy()
    return found.sum(-1), found
