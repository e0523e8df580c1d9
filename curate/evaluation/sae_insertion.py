"""What an SAE costs where it is inserted, layer by layer, and the choice of a layer (METHODS §5; paper B, A.1).

In: items of an evaluator asked of a model before and after insertion; states of held-out rows. Out: drops with
intervals, how much of the states is kept, the layer that is chosen. Knows no cluster and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curate.concepts.sae import SAE, decode, encode
from curate.errors import ConfigError, near
from curate.evaluation.base import Evaluator, Item, Measure, Metric, summarise


@dataclass(frozen=True)
class Quality:
    """Of states that were not trained on. `explained_variance`: 1 − Σ‖x − x̃‖²/Σ‖x − x̄‖², the few longest states count
    most; `explained_tokens`: 1 − the mean over tokens of ‖x − x̃‖²/‖x − b‖², b the SAE's bias, every token counts
    alike. `l0`: active latents of a token; `dead`: share of latents that fire on none of the `tokens`."""

    explained_variance: float
    explained_tokens: float
    l0: float
    dead: float
    tokens: int


@dataclass(frozen=True)
class LayerResult:
    """One layer. `drop`: of the metric, so that more is worse (see `drop_items`). `curve`: (tokens seen, error) of the
    training."""

    layer: int
    url: str
    before: Measure
    after: Measure
    drop: Measure
    quality: Quality
    trained: Mapping[str, Any]
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LayerSweep:
    """All layers that were tried, in order. `middle`: first and last layer of the middle half; `chosen` is in it unless
    none of the tried layers is; `best` is the best of all."""

    evaluator: str
    metric: Metric
    middle: tuple[int, int]
    layers: tuple[LayerResult, ...]
    chosen: int
    best: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of(self, layer: int) -> LayerResult:
        """The result of a layer that was tried."""
        return next(r for r in self.layers if r.layer == layer)


def pick_metric(evaluators: Mapping[str, Evaluator], wanted: str | None) -> tuple[str, Metric]:
    """The evaluator and metric that decide: `<evaluator>.<metric>`, or the first that says good or bad.

    Raises:
        ConfigError: there is no such one.
    """
    all_of = {f"{label}.{m.name}": (label, m) for label, e in evaluators.items() for m in e.metrics}
    if wanted is not None:
        if wanted not in all_of:
            raise ConfigError(f"sae.metric is {wanted!r}, which no evaluator measures{near(wanted, all_of)}")
        return all_of[wanted]
    found = next((pair for pair in all_of.values() if pair[1].sense != "count"), None)
    if found is None:
        raise ConfigError(f"no evaluator has a metric that can fall; name one with sae.metric{near('', all_of)}")
    return found


def drop_items(before: Sequence[Item], after: Sequence[Item], metric: Metric) -> list[Item]:
    """What insertion took from each item, more = worse: the fall of a capability, the rise of a loss or a count, any
    change of a trait. Items without a value before or after have none."""
    then = {i.id: i.values.get(metric.name) for i in before}
    out = []
    for item in after:
        a, b = then.get(item.id), item.values.get(metric.name)
        value = None if a is None or b is None else a - b
        if value is not None and metric.sense in ("loss", "count"):
            value = -value
        out.append(Item(item.id, {metric.name: value}, item.group))
    return out


def drop(before: Sequence[Item], after: Sequence[Item], metric: Metric) -> Measure:
    """The mean drop over items with its interval; of a trait, the size of the mean change."""
    found = summarise(drop_items(before, after, metric), [metric])[metric.name]
    if metric.sense != "trait" or found.value is None or found.value >= 0:
        return found
    low, high = (None if x is None else -x for x in (found.high, found.low))
    return Measure(-found.value, low, high, found.n, found.missing)


def choose(results: Sequence[LayerResult], middle: Sequence[int]) -> tuple[int, int]:
    """(the layer of the smallest drop within `middle`, that of the smallest drop of all). Of equal drops the one that
    explains more of the tokens; without any layer in the middle half the first is the second.

    Raises:
        ConfigError: no layer has a drop, as no item could be asked.
    """
    known = [r for r in results if r.drop.value is not None]
    if not known:
        raise ConfigError("no layer can be chosen: not one item was answered both before and after insertion")

    def key(r: LayerResult) -> tuple[float, float, int]:
        return (r.drop.value or 0.0, -r.quality.explained_tokens, r.layer)

    best = min(known, key=key)
    return min([r for r in known if r.layer in middle] or [best], key=key).layer, best.layer


class QualitySums:
    """Quality over several batches of states."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.fired = torch.zeros(sae.latents, dtype=torch.bool, device=sae.w_enc.device)
        self.mean = torch.zeros(sae.width, dtype=torch.float64, device=sae.w_enc.device)
        self.sums = torch.zeros(5, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n d"]) -> None:
        sparse = encode(self.sae, x)
        x = x.double()
        squared = (x - decode(self.sae, sparse)).square().sum(-1)
        distance = (x - self.sae.b_dec / self.sae.scale).square().sum(-1)
        self.fired[sparse.indices[sparse.active]] = True
        self.mean += x.sum(0)
        shares = (squared / distance.clamp(min=1e-12)).sum()
        told = (squared.sum(), x.square().sum(), shares, sparse.active.sum(), len(x))
        self.sums += torch.tensor([float(t) for t in told], dtype=torch.float64)

    def result(self) -> Quality:
        squared, length, shares, active, n = self.sums.tolist()
        n = max(n, 1.0)
        variance = max(length - float(self.mean.square().sum()) / n, 1e-30)
        return Quality(1 - squared / variance, 1 - shares / n, active / n, 1 - float(self.fired.float().mean()), int(n))
