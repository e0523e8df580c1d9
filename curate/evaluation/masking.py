"""What masking latents did: per item as arrays, and over items as means with bootstrap intervals.

In: measures by order, mode, k and item. Out: the tables behind necessity and sufficiency curves (paper B figures 3, 4).
Knows no model and no SAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from curate.errors import ConfigError, near
from curate.evaluation.ranking import Estimate

Mode = Literal["necessity", "sufficiency"]
MODES: tuple[Mode, ...] = ("necessity", "sufficiency")
MEASURES = ("delta_logit", "delta_nll", "flip", "same", "right", "logit", "nll")
BASE = ("right", "logit", "nll", "spliced_right", "spliced_logit", "spliced_nll", "agree")
# What each mode is judged by, and whether more of it speaks for an order.
JUDGED: dict[Mode, tuple[tuple[str, int], ...]] = {
    "necessity": (("delta_logit", -1), ("delta_nll", 1), ("flip", 1)),
    "sufficiency": (("same", 1), ("logit", 1)),
}
REPLICATES = 1000


@dataclass(frozen=True)
class Masking:
    """What one order's first k latents do; means over items with 95 % intervals of resampled items.

    necessity zeroes them, sufficiency all others. delta_logit, delta_nll: of the correct token, against the spliced
    model without a mask (nats for nll = −log p). flip: share of items whose prediction changes; same = 1 − flip.
    right: share whose prediction is right. logit, nll: of the correct token under the mask.
    """

    method: str
    mode: Mode
    k: int
    delta_logit: Estimate
    delta_nll: Estimate
    flip: Estimate
    same: Estimate
    right: Estimate
    logit: Estimate
    nll: Estimate


@dataclass(frozen=True)
class Unmasked:
    """The model without a mask: `spliced` has the SAE's reconstruction in place of the layer, the other does not.

    agree: share of items on which both predict the same.
    """

    right: Estimate
    logit: Estimate
    nll: Estimate
    spliced_right: Estimate
    spliced_logit: Estimate
    spliced_nll: Estimate
    agree: Estimate


@dataclass(frozen=True)
class Contrast:
    """`method` − `other` in one measure, mean over ks; the interval is of paired items. better: +1 where more of the
    measure speaks for `method`, −1 where less does."""

    method: str
    other: str
    mode: Mode
    measure: str
    better: int
    difference: Estimate


@dataclass(frozen=True)
class FaithfulnessTable:
    """Plain values, for reports."""

    items: int
    ks: tuple[int, ...]
    methods: tuple[str, ...]
    maskings: tuple[Masking, ...]
    unmasked: Unmasked
    contrasts: tuple[Contrast, ...] = ()


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Per item. values: by (method, mode), each of MEASURES [k, items], means over an order's draws. base: BASE."""

    ks: tuple[int, ...]
    methods: tuple[str, ...]
    values: Mapping[tuple[str, Mode], Mapping[str, Float[np.ndarray, "k items"]]]
    base: Mapping[str, Float[np.ndarray, " items"]]

    @property
    def items(self) -> int:
        """How many test items."""
        return len(self.base["logit"])

    def contrast(
        self, method: str, other: str, mode: Mode, measure: str, replicates: int = REPLICATES, seed: int = 0
    ) -> Estimate:
        """Mean over ks of `method` − `other`; the interval is of paired items.

        Raises:
            ConfigError: an order that was not measured.
        """
        for name in (method, other):
            if name not in self.methods:
                raise ConfigError(f"the order {name!r} was not measured{near(name, self.methods)}")
        both = self.values[method, mode][measure] - self.values[other, mode][measure]
        return estimates(both.mean(axis=0)[None], replicates, seed)[0]

    def table(
        self, reference: str | None = "influence", replicates: int = REPLICATES, seed: int = 0
    ) -> FaithfulnessTable:
        """Means and intervals; `reference` is contrasted with every other order (None: nothing is)."""
        maskings = []
        for (method, mode), by in self.values.items():
            found = [estimates(by[measure], replicates, seed) for measure in MEASURES]
            maskings += [Masking(method, mode, k, *(of[j] for of in found)) for j, k in enumerate(self.ks)]
        contrasts = [
            Contrast(
                reference,
                other,
                mode,
                measure,
                better,
                self.contrast(reference, other, mode, measure, replicates, seed),
            )
            for other in self.methods
            for mode in MODES
            for measure, better in JUDGED[mode]
            if reference is not None and other != reference
        ]
        base = estimates(np.stack([self.base[name] for name in BASE]), replicates, seed)
        return FaithfulnessTable(self.items, self.ks, self.methods, tuple(maskings), Unmasked(*base), tuple(contrasts))


def merged(parts: Sequence[Faithfulness]) -> Faithfulness:
    """Measures of all parts' items, in order.

    Raises:
        ConfigError: no parts, or parts of other orders or ks.
    """
    if not parts:
        raise ConfigError("there are no test items, so faithfulness cannot be measured; give at least one")
    first = parts[0]
    for part in parts[1:]:
        if (part.ks, part.methods) != (first.ks, first.methods):
            raise ConfigError(
                f"faithfulness of {part.methods} at {part.ks} cannot join that of {first.methods} at {first.ks}"
            )
    return Faithfulness(
        first.ks,
        first.methods,
        {key: {m: np.concatenate([p.values[key][m] for p in parts], axis=1) for m in MEASURES} for key in first.values},
        {name: np.concatenate([p.base[name] for p in parts]) for name in BASE},
    )


def estimates(values: Float[np.ndarray, "c n"], replicates: int, seed: int) -> list[Estimate]:
    """Means over items, and percentile intervals over the same resamples of items for every row."""
    n = values.shape[1]
    means = values.mean(axis=1)
    if n < 2 or replicates < 1:
        return [Estimate(float(m), None, None) for m in means]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates) / n
    low, high = np.percentile(values @ drawn.T, [2.5, 97.5], axis=1)
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True)]
