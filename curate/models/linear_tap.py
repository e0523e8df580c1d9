"""Linear tap: one forward and one backward that show each tracked layer's input and the gradient at its output.

In: a model, tracked layers, token ids, a scalar objective of one hidden state. Out: for every tracked layer a call with
a [batch, tokens, in] and δ [batch, tokens, out], from the last layer to the first; no weight gets a gradient. This is
all that factors (a aᵀ, δ δᵀ), query gradients (Σ_t δ_t a_tᵀ) and contraction scores (Σ_t δ_tᵀ S a_t) are made of.
Does not know what the objective is. The backward ends at the lowest tracked block, the forward at the layer read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from curate.errors import ConfigError, CurvatureError, ModelError
from curate.models.tap import LayerTap, n_layers
from curate.models.tracked import TrackedLayer

OnLayer = Callable[[TrackedLayer, Float[Tensor, "batch tokens in"], Float[Tensor, "batch tokens out"]], None]
Objective = Callable[[Float[Tensor, "batch tokens d"]], Float[Tensor, ""]]


class LinearTap:
    """
    Args:
        model: weights must not require gradients.
        layers: from `tracked_layers`.
        top: the layer whose hidden state the objective reads (numbered as `hidden_states`); None: the last, after the
            final norm.

    Raises:
        ConfigError: every tracked layer lies above `top`, so that every gradient would be zero.
        ModelError: the model's weights ask for gradients, or there is no such layer.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[TrackedLayer], top: int | None = None) -> None:
        self.model = model
        self.top = n_layers(model) if top is None else top
        if any(p.requires_grad for p in model.parameters()):
            raise ModelError("the model's weights require gradients; call model.requires_grad_(False) first")
        self.layers = [layer for layer in layers if layer.block < self.top]
        if not self.layers:
            lowest = min((layer.block for layer in layers), default=0)
            raise ConfigError(
                f"the behaviour reads layer {self.top}, but the tracked layers begin at block {lowest}: its gradient "
                f"is zero there. Track blocks below {self.top}, or read a higher layer."
            )
        self.lowest = min(layer.block for layer in self.layers)
        self._tap = LayerTap(model, [self.top])

    def backward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        objective: Objective,
        on_layer: OnLayer,
    ) -> Float[Tensor, ""]:
        """Call `on_layer` for every tracked layer; returns the objective's value, detached.

        With an objective that is a sum over rows, each row's a and δ are its own. Padding on the right needs no mask.

        Raises:
            CurvatureError: not every token reaches a tracked layer (a router chooses); names it.
        """
        inputs: dict[str, Tensor] = {}
        handles = []

        def watch(layer: TrackedLayer) -> Any:
            def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs[layer.name] = _by_token(args[0], layer, input_ids.shape)
                output.register_hook(
                    lambda delta: on_layer(layer, inputs.pop(layer.name), _by_token(delta, layer, input_ids.shape))
                )

            return forward

        for layer in self.layers:
            handles.append(self.model.get_submodule(layer.name).register_forward_hook(watch(layer)))
        try:
            return self._tap.backward_from(input_ids, self.lowest, objective)
        finally:
            for handle in handles:
                handle.remove()


def _by_token(states: Tensor, layer: TrackedLayer, shape: Sequence[int]) -> Float[Tensor, "batch tokens n"]:
    """What a layer read or gave, as [batch, tokens, n]: some families (OPT) flatten the two on the way."""
    n = states.shape[-1]
    if states.numel() != math.prod(shape) * n:
        raise CurvatureError(
            f"the layer {layer.name!r} was reached by {states.numel() // n} of the {math.prod(shape)} tokens of a "
            f"batch: a router chooses which. Leave it out, by the kind or the pattern of the tracked layers."
        )
    return states.detach().reshape(*shape, n)
