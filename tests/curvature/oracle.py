"""Gradients by autograd through the whole model, one unpadded row at a time; rows to take them of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from curate.corpus.render import Rendered
from curate.models.tracked import TrackedLayer

Loss = Callable[[Tensor], Tensor]  # of the logits [tokens, vocabulary]


def make_rows(n: int, vocab: int = 300, seed: int = 0, longest: int = 14) -> list[Rendered]:
    """Rows of 4 to `longest` tokens with a response somewhere, and now and then a token after its end."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        length = int(torch.randint(4, longest + 1, (), generator=g))
        start = int(torch.randint(0, length - 2, (), generator=g))
        end = length - i % 2
        rows.append(Rendered(torch.randint(4, vocab, (length,), generator=g).tolist(), start, end - 1, end))
    return rows


def names_of(rows: Sequence[Rendered]) -> list[str]:
    return [f"r{i}" for i in range(len(rows))]


def response_loss(row: Rendered) -> Loss:
    """Σ cross-entropy of the tokens [start, end)."""
    first = max(row.start, 1)
    targets = torch.tensor(row.input_ids[first : row.end])
    return lambda logits: torch.nn.functional.cross_entropy(logits[first - 1 : row.end - 1], targets, reduction="sum")


def count(row: Rendered) -> int:
    return row.end - max(row.start, 1)


def inputs_and_deltas(
    model: PreTrainedModel, layers: Sequence[TrackedLayer], ids: Sequence[int], loss: Loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (a [tokens, in], δ [tokens, out])}."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: kept.update({name: (args[0].detach(), output)})

    modules = [(layer.name, model.get_submodule(layer.name)) for layer in layers]
    handles = [module.register_forward_hook(keep(name)) for name, module in modules]
    embeddings = model.get_input_embeddings()
    try:
        states = embeddings(torch.tensor([list(ids)])).detach().requires_grad_(True)
        value = loss(model(inputs_embeds=states).logits[0])
    finally:
        for handle in handles:
            handle.remove()
    deltas = torch.autograd.grad(value, [kept[name][1] for name, _ in modules], allow_unused=True)
    out = {}
    for (name, _), delta in zip(modules, deltas, strict=True):
        a, output = kept[name]
        delta = torch.zeros_like(output) if delta is None else delta
        out[name] = (a.reshape(len(ids), -1), delta.reshape(len(ids), -1))  # OPT has no batch dimension there
    return out


def weight_gradients(
    model: PreTrainedModel, layers: Sequence[TrackedLayer], ids: Sequence[int], loss: Loss
) -> dict[str, Tensor]:
    """{layer: gradient [out, in]}."""
    modules = [model.get_submodule(layer.name) for layer in layers]
    for module in modules:
        module.weight.requires_grad_(True)
    try:
        value = loss(model(input_ids=torch.tensor([list(ids)])).logits[0])
        found = torch.autograd.grad(value, [module.weight for module in modules])
    finally:
        model.requires_grad_(False)
    return {
        layer.name: gradient.T if isinstance(module, Conv1D) else gradient
        for layer, module, gradient in zip(layers, modules, found, strict=True)
    }
