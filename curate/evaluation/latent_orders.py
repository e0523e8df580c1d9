"""Orders of an SAE's latents, first the one that is said to matter most: what faithfulness compares.

In: importances of latents for a test item, or the item itself. Out: latents in order. Does not know what becomes of
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from curate.concepts.sae import SAE
from curate.corpus.render import Rendered
from curate.errors import ConfigError
from curate.evaluation.faithfulness import KS, Order, Question, active_latents
from curate.models.tap import LayerTap

INFLUENCE, PAPER = "influence", "influence, paper's sign"
MAGNITUDE, FREQUENCY, RANDOM, RANDOM_ACTIVE = "activation magnitude", "frequency", "random", "random, active"


def influence_orders(
    importance: Mapping[int, float] | Float[np.ndarray, " h"], latents: int, first: int = KS[-1]
) -> dict[str, Order]:
    """Orders of one item's importances s_k, positive where training helps the answer (paper B §5.4).

    "influence" begins with the latents through which training helps most; "influence, paper's sign" with those of the
    largest change of the test loss, which is the other end (METHODS §5). Latents that `importance` lacks count as 0;
    equal ones keep their number's order.

    Args:
        first: latents kept of each order, at least the largest k.

    Raises:
        ConfigError: an importance is not finite, or of a latent that the SAE lacks.
    """
    values = np.zeros(latents)
    if isinstance(importance, Mapping):
        where = np.fromiter(importance.keys(), dtype=np.int64, count=len(importance))
        if len(where) and (where.min() < 0 or where.max() >= latents):
            raise ConfigError(f"an importance is of latent {where.max()}, but the SAE has 0..{latents - 1}")
        values[where] = np.fromiter(importance.values(), dtype=np.float64, count=len(importance))
    elif len(importance) != latents:
        raise ConfigError(f"there are {len(importance)} importances, but the SAE has {latents} latents")
    else:
        values[:] = importance
    if not np.isfinite(values).all():
        raise ConfigError(f"the importance of latent {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    falling, rising = (np.argsort(sign * values, kind="stable") for sign in (-1, 1))
    return {INFLUENCE: falling[:first], PAPER: rising[:first]}


def activity_orders(
    model: PreTrainedModel,
    sae: SAE,
    items: Sequence[Question | Rendered],
    draws: int = 3,
    seed: int = 0,
    first: int = KS[-1],
    numbers: Sequence[int] | None = None,
) -> dict[str, list[Order]]:
    """The baselines, one order an item, from the item's own prompt (harder to beat than activity on other rows).

    "activation magnitude": Σ over tokens of the activation. "frequency": tokens on which the latent fires (of as
    many, the larger magnitude first). "random": any latents; "random, active": those that fire, then others; both
    `draws` times.

    Args:
        numbers: the items' numbers in the whole, which their random draws depend on (default: 0, 1, …).

    Raises:
        ConfigError: an item without a prompt.
    """
    tap = LayerTap(model, [sae.layer])
    out: dict[str, list[Order]] = {name: [] for name in (MAGNITUDE, FREQUENCY, RANDOM, RANDOM_ACTIVE)}
    for number, item in zip(numbers or range(len(items)), items, strict=True):
        rendered = item.rendered if isinstance(item, Question) else item
        _, sparse = active_latents(tap, sae, rendered, number)
        size = sparse.values.double().flatten().cpu().numpy()
        where = sparse.indices.flatten().cpu().numpy()
        magnitude = np.bincount(where, weights=size, minlength=sae.latents)
        count = np.bincount(where, weights=size > 0, minlength=sae.latents)
        rng = np.random.default_rng([seed, number])
        drawn = [rng.permutation(sae.latents) for _ in range(draws)]
        fires = [order[np.argsort(count[order] == 0, kind="stable")] for order in drawn]
        out[MAGNITUDE].append(np.argsort(-magnitude, kind="stable")[:first])
        out[FREQUENCY].append(np.lexsort((-magnitude, -count))[:first])
        out[RANDOM].append(np.stack([order[:first] for order in drawn]))
        out[RANDOM_ACTIVE].append(np.stack([order[:first] for order in fires]))
    return out
