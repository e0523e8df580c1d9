"""Splice: an SAE's reconstruction in place of a layer's state, and the part of a model above a layer (METHODS §5).

In: any Hugging Face decoder, an SAE or states of one layer. Out: a model that computes with x̃ instead of x while a
`with` lasts; last hidden states from states of a layer, for which the blocks below are not run. Layers are numbered as
`hidden_states`: 0 is what enters the first block, L the state after the final norm, which the head reads.
Knows no loss and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from curate.concepts.sae import SAE, Sparse, check_width, decode, encode
from curate.models.tap import check_layers, decoder_parts, n_layers, replaced_inputs, width

Edit = Callable[[Sparse], Sparse]


def downstream(
    model: PreTrainedModel,
    layer: int,
    x: Float[Tensor, "batch tokens d"],
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens d"]:
    """The last hidden states (layer L, after the final norm), from x as hidden_states[layer].

    Blocks below `layer` are not run. Differentiable in x and in the weights that are read, as often and in the modes
    that the model's attention allows: twice and forward-mode with the eager one or the `math` kernel. Padding on the
    right needs no mask. x is what block `layer` reads: an SAE spliced in at `layer` is not applied to it again, those
    at higher layers are. layer = L gives x back.

    Raises:
        ModelError: there is no such layer.
    """
    check_layers(model, [layer])
    if layer == n_layers(model):
        return x
    blocks = decoder_parts(model).blocks
    below = list(blocks[:layer])
    # The model needs something to start from; what becomes of it is thrown away at block `layer`.
    ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    try:
        for i, block in enumerate(below):
            blocks[i] = _Skipped(block, x)
        with replaced_inputs(blocks, {layer: lambda _: x}):
            return model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    finally:
        for i, block in enumerate(below):
            blocks[i] = block


@contextmanager
def spliced(model: PreTrainedModel, sae: SAE, edit: Edit | None = None) -> Iterator[None]:
    """Within it, the model's forward has x̃ = decode(edit(encode(x))) in place of hidden_states[sae.layer].

    Every token of every forward, so `generate` with a cache and likelihoods work as ever. `edit` gets the activations
    of a forward's states, [batch·tokens, k] row by row, and may change their values (`sae.keep`). The SAE computes in
    its own precision, on its own device, which must be the model's. Gradients flow through both encoder and decoder.

    Raises:
        ModelError: there is no such layer. ConceptError: the SAE has another width.
    """
    check_layers(model, [sae.layer])
    check_width(sae, width(model))

    def through(x: Tensor) -> Tensor:
        sparse = encode(sae, x.flatten(0, -2))
        return decode(sae, sparse if edit is None else edit(sparse)).to(x.dtype).view_as(x)

    parts = decoder_parts(model)
    if sae.layer == n_layers(model):

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = through(output.last_hidden_state)
            return output

        handle = parts.stack.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()
        return
    with replaced_inputs(parts.blocks, {sae.layer: through}):
        yield


class _Skipped(nn.Module):
    """Stands in for a block that is not run. The model may ask it for the block's attributes (Gemma 2 does)."""

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.__dict__.update(block=block, x=x)  # not as a submodule: the block stays where it was

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Whatever the family unpacks from it (some blocks give tuples), the next block starts from its own.
        return self.__dict__["x"]
