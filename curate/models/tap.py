"""Layer taps: the residual stream of any Hugging Face decoder, with a forward pass that stops at the tapped layer.

In: a causal LM and token ids. Out: hidden states, numbered as Hugging Face numbers `hidden_states` (METHODS: layer l
is the output of block l-1, 0 the embeddings as they enter the first block, the last one after the final norm), and
their gradients for a loss. Does not know what the activations are for, nor which tokens are a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from curate.errors import ModelError

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm")


@dataclass(frozen=True)
class DecoderParts:
    """The pieces of a decoder, in the order that the data flows. `final_norm` is None where the model has none; `stack`
    is the module that runs all but the head, and gives the last hidden state."""

    embeddings: nn.Module
    blocks: nn.ModuleList
    final_norm: nn.Module | None
    head: nn.Module
    stack: nn.Module

    def __iter__(self) -> Iterator[Any]:
        return iter((self.embeddings, self.blocks, self.final_norm, self.head))


class _Reached(Exception):
    """Raised inside the forward pass once the highest tapped layer is captured; never leaves this module."""


def n_layers(model: PreTrainedModel) -> int:
    """Number of blocks L; the valid layers are 0..L."""
    return int(model.config.get_text_config().num_hidden_layers)


def width(model: PreTrainedModel) -> int:
    """Width d of the residual stream."""
    return int(model.config.get_text_config().hidden_size)


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Find embeddings, blocks, final norm and head of a causal LM, whatever its modules are called.

    Raises:
        ModelError: the model has no list of as many blocks as its config says, or no head.
    """
    count, kind = n_layers(model), type(model).__name__
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelError(f"{kind} has no list of {count} blocks; only decoder-only language models can be tapped")
    path, blocks = min(lists, key=lambda item: item[0].count("."))
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{kind} has no language-model head; load it as a causal language model")
    owner = model.get_submodule(path.rpartition(".")[0])
    norm = next((getattr(owner, n) for n in _NORMS if isinstance(getattr(owner, n, None), nn.Module)), None)
    return DecoderParts(model.get_input_embeddings(), blocks, norm, head, owner)


def check_layers(model: PreTrainedModel, layers: Iterable[int]) -> tuple[int, ...]:
    """`layers` sorted and without doubles.

    Raises:
        ModelError: a layer is outside 0..L, or there is none.
    """
    top = n_layers(model)
    wanted = tuple(sorted(set(layers)))
    if not wanted:
        raise ModelError(f"no layer is given; the valid layers of {type(model).__name__} are 0..{top}")
    for layer in wanted:
        if not 0 <= layer <= top:
            raise ModelError(
                f"layer {layer} does not exist: {type(model).__name__} has the layers 0..{top} "
                f"(0 = embeddings, {top} = after the final norm)"
            )
    return wanted


def head_logits(model: PreTrainedModel, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
    """Logits of states that are already past the final norm (layer L), exactly as the model's own forward makes them.

    Several families scale or cap the head's output; a loss from the bare head would be that of another model.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2 and later
        logits = torch.tanh(logits / cap) * cap
    return logits


def _stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


class LayerTap:
    """Reads the layers `layers` of `model`. Nothing above the highest one is computed, and never the head."""

    def __init__(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        self.layers = check_layers(model, layers)
        self.model = model
        self.parts = decoder_parts(model)
        self.n_layers = len(self.parts.blocks)

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Int[Tensor, "batch tokens"] | None = None
    ) -> dict[int, Float[Tensor, "batch tokens d"]]:
        """Hidden states of the tapped layers, equal to Hugging Face's; padding positions hold meaningless values.

        The mask may be left out where padding is on the right: attention is causal, so no token sees what follows it.
        Without one the kernels are faster (by 6 % on a CPU; on GPUs only then can they be the fused causal ones).
        """
        seen: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor) -> None:
            seen[layer] = state
            if layer == self.layers[-1]:
                raise _Reached

        with torch.no_grad(), self._hooks(self.layers, keep):
            with suppress(_Reached):
                seen[self.n_layers] = self._decode(input_ids, attention_mask)
        return {layer: seen[layer] for layer in self.layers}

    def grad_forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None,
        layers: Iterable[int],
        loss_fn: Callable[[Float[Tensor, "batch tokens d"]], Float[Tensor, ""]],
    ) -> tuple[dict[int, Float[Tensor, "batch tokens d"]], dict[int, Float[Tensor, "batch tokens d"]]]:
        """One forward and one backward: hidden states of the tap's layers, and ∂loss/∂h_l for every l in `layers`.

        `loss_fn` gets the last hidden state (layer L, after the final norm; see `head_logits`) and returns a scalar.
        With the loss summed over rows, each row's gradient is its own. The backward stops at the lowest of `layers`;
        blocks below it keep nothing, and no weight gets a gradient (the model must have `requires_grad_(False)`).
        Not differentiable again (paper A eq. 12 needs the first derivative only).

        Raises:
            ModelError: a layer is outside 0..L, or the model's weights ask for gradients.
        """
        wanted = check_layers(self.model, layers)
        if any(p.requires_grad for p in self.model.parameters()):
            raise ModelError("the model's weights require gradients; call model.requires_grad_(False) first")
        live: dict[int, Tensor] = {}
        seen: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor) -> Tensor | None:
            root = None
            if layer == wanted[0]:
                # A fresh leaf takes the state's place, so that the backward ends here.
                state = root = state.detach().requires_grad_(True)
            if layer in wanted:
                live[layer] = state
            if layer in self.layers:
                seen[layer] = state.detach()
            return root

        with torch.enable_grad(), self._hooks(sorted({*wanted, *self.layers}), keep):
            last = self._decode(input_ids, attention_mask)
            last = _or(keep(self.n_layers, last), last)
            loss = loss_fn(last)
            gradients = torch.autograd.grad(loss, [live[layer] for layer in wanted])
        return {layer: seen[layer] for layer in self.layers}, dict(zip(wanted, gradients, strict=True))

    def backward_from(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        lowest: int,
        objective: Callable[[Float[Tensor, "batch tokens d"]], Float[Tensor, ""]],
    ) -> Float[Tensor, ""]:
        """A backward of objective(h_top) down to the input of block `lowest`, for those who hook what lies between.

        `top` is the tap's highest layer: nothing above it is computed. Returns the objective's value, detached.
        """
        top = self.layers[-1]
        held: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor) -> Tensor | None:
            if layer == lowest:
                held[layer] = state.detach().requires_grad_(True)
                return held[layer]
            held[layer] = state
            raise _Reached

        with torch.enable_grad(), self._hooks([lowest, *([top] if top != self.n_layers else [])], keep):
            with suppress(_Reached):
                held[top] = self._decode(input_ids, None)
            value = objective(held[top])
            value.backward(inputs=[held[lowest]])
        return value.detach()

    def _decode(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        # The base model has no head. Hugging Face's hidden_states[-1] is this output for every decoder.
        return self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def _hooks(
        self, layers: Iterable[int], keep: Callable[[int, Tensor], Tensor | None]
    ) -> AbstractContextManager[None]:
        """Call `keep(l, state)` as the state of layer l < L enters block l; what it returns replaces the state."""
        return replaced_inputs(self.parts.blocks, {n: partial(keep, n) for n in layers if n < self.n_layers})


@contextmanager
def replaced_inputs(blocks: nn.ModuleList, calls: Mapping[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Within it, `calls[l](state)` is called as a state enters block l; what it returns, if anything, replaces it.

    The input of a block, not the output of the one before: it holds what models add in between (positions of GPT-2,
    the scale of Gemma's embeddings), and it is what Hugging Face reports as hidden_states[l].
    """

    def hook(call: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = call(_stream(args, kwargs))
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return before

    handles = [blocks[n].register_forward_pre_hook(hook(call), with_kwargs=True) for n, call in calls.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _or(new: Tensor | None, old: Tensor) -> Tensor:
    return old if new is None else new
