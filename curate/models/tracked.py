"""Tracked layers: the linear layers whose weights curvature and influence see, chosen by kind, block and name.

In: a model and a choice. Out: the layers in order of the forward pass, which of them read one input, and how much of
the model that covers. Knows no gradients.

A linear layer has a weight W [out, in] (GPT-2's Conv1D keeps it transposed); its bias is not tracked. The matrices of
an unmerged LoRA adapter are linear layers like any other: `kind="adapter"` tracks them and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from curate.errors import ConfigError
from curate.models.spec import Kind, LayerChoice
from curate.models.tap import decoder_parts

_ADAPTER = re.compile(r"\.lora_[AB]\.")
_PROBE = (2, 32)  # rows and tokens of different ids: enough that no router sends them all to one expert
_ATTENTION = re.compile(r"\.(self_attn|self_attention|attn|attention)\.")


@dataclass(frozen=True)
class TrackedLayer:
    """One linear layer: `name` in the model, W [out, in], the block it lies in, and `reads`, the name of the first
    layer that reads the same input (itself for most; q for k and v): layers of one `reads` share one input covariance.
    """

    name: str
    out: int
    width: int
    block: int
    reads: str

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.out * self.width


@dataclass(frozen=True)
class Coverage:
    """How much of the model is tracked: parameters, and what is left out, as {what: parameters} (a tied head once)."""

    tracked: int
    total: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def share(self) -> float:
        return self.tracked / self.total

    def __str__(self) -> str:
        rest = ", ".join(f"{what} {n / self.total:.1%}" for what, n in self.left_out.items())
        return f"{self.share:.1%} of {self.total:,} parameters tracked" + (f" (not: {rest})" if rest else "")


def weight_of(module: nn.Module) -> Tensor:
    """W [out, in] of a linear layer, a view of its own weight."""
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def is_linear(module: nn.Module) -> bool:
    """True for what is a matrix product with a weight of real numbers: nn.Linear (not a quantised one), Conv1D."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    return module.weight.ndim == 2 and module.weight.is_floating_point()


def tracked_layers(model: PreTrainedModel, choice: LayerChoice) -> tuple[list[TrackedLayer], Coverage]:
    """The layers of `choice` in the order in which the forward pass reaches them.

    Raises:
        ConfigError: nothing matches; the message shows names that there are.
    """
    blocks = decoder_parts(model).blocks
    paths = {id(b): name for name, b in model.named_modules()}
    first, last = choice.first or 0, len(blocks) if choice.last is None else choice.last
    if not 0 <= first < last <= len(blocks):
        raise ConfigError(
            f"the blocks {first} to {last} are asked for; {type(model).__name__} has the blocks 0 to {len(blocks)}, "
            f"the last one not counted"
        )
    candidates: dict[str, tuple[nn.Module, int]] = {}
    for number in range(first, last, choice.stride):
        root = paths[id(blocks[number])]
        for inner, module in blocks[number].named_modules():
            name = f"{root}.{inner}"
            if is_linear(module) and _of_kind(name, choice.kind) and re.search(choice.pattern or "", name):
                candidates[name] = (module, number)
    if not candidates:
        have = [n for n, m in model.named_modules() if is_linear(m) and id(m) != id(model.get_output_embeddings())]
        raise ConfigError(
            f"no linear layer matches kind={choice.kind!r}, pattern={choice.pattern!r} in the blocks {first} to "
            f"{last}. Names there are: {', '.join(have[:9])}{' …' if len(have) > 9 else ''}"
        )
    reads, skipped = _inputs(model, candidates)
    layers = [
        TrackedLayer(name, *_shape(candidates[name][0]), candidates[name][1], source) for name, source in reads.items()
    ]
    return layers, _coverage(model, layers, skipped)


def _of_kind(name: str, kind: Kind) -> bool:
    if _ADAPTER.search(name):
        return kind == "adapter"
    if kind in ("all", "adapter"):
        return kind == "all"
    return bool(_ATTENTION.search(name)) == (kind == "attention")


def _shape(module: nn.Module) -> tuple[int, int]:
    out, width = weight_of(module).shape
    return int(out), int(width)


def _inputs(
    model: PreTrainedModel, candidates: Mapping[str, tuple[nn.Module, int]]
) -> tuple[dict[str, str], list[str]]:
    """{name: first layer that reads the same tensor}, in the order of a short forward; and who saw not all tokens."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = (torch.arange(math.prod(_PROBE), device=model.device) % vocabulary).view(_PROBE)
    seen: list[Tensor] = []  # kept, so that no address is used twice
    owner: dict[int, str] = {}
    reads: dict[str, str] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            if args[0].numel() == ids.numel() * args[0].shape[-1]:  # else a router chose which tokens come here
                reads.setdefault(name, owner.setdefault(id(args[0]), name))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, (module, _) in candidates.items()]
    try:
        with torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return reads, [name for name in candidates if name not in reads]


def _coverage(model: PreTrainedModel, layers: Sequence[TrackedLayer], skipped: Sequence[str]) -> Coverage:
    mine = {f"{layer.name}.weight" for layer in layers}
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    left_out: dict[str, int] = {}
    fused: list[str] = []
    total = 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        if name in mine:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if id(weight) in embeddings or isinstance(owner, nn.Embedding):
            what = "embeddings"
        elif is_linear(owner):
            what = "biases" if weight.ndim == 1 else "other linear layers"
        elif weight.ndim >= 3 and "conv" not in type(owner).__name__.lower():
            what = "fused experts"
            fused.append(name)
        elif weight.ndim >= 2:
            what = type(owner).__name__
            fused.append(name)
        else:
            what = "norms"
        left_out[what] = left_out.get(what, 0) + weight.numel()
    warnings = []
    if fused:
        warnings.append(
            f"influence does not see {len(fused)} weights that are no plain linear layers, such as {fused[0]!r}: "
            f"fused experts, convolutions and the like are not tracked"
        )
    if skipped:
        warnings.append(
            f"{len(skipped)} layers are not reached by every token (experts?) and not tracked: {skipped[0]!r}"
        )
    ordered = dict(sorted(left_out.items(), key=lambda kv: -kv[1]))
    return Coverage(sum(layer.size for layer in layers), total, ordered, tuple(warnings))
