"""Gradients item by item: ∇f of one behaviour for every query by itself, where behaviours.py gives their mean.

In: a model, its tracked layers, a behaviour, queries (test items). Out: gradients by the queries' ids, of the form that
every solve takes: a test vector then has one row an item. Within `spliced` they are those of the model with its SAE.
Knows no curvature and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedModel

from curate.curvature.behaviour import Behaviour, Gradients, query_gradients
from curate.curvature.queries import Query
from curate.errors import CurvatureError
from curate.models.tracked import TrackedLayer


def item_gradients(
    model: PreTrainedModel, layers: Sequence[TrackedLayer], behaviour: Behaviour, queries: Sequence[Query], pad_id: int
) -> Gradients:
    """{query id: {layer: ∇f [out, in]}} on the CPU; one forward and one backward an item. All items are in memory:
    4 bytes a tracked weight and item.

    Raises:
        CurvatureError: no item, two of one id, or what `query_gradients` raises, with the item named.
        ConfigError, ModelError: see `query_gradients`.
    """
    check_items(queries)
    found: Gradients = {}
    for query in queries:
        try:
            one = query_gradients(model, layers, [behaviour], [query], pad_id)
        except CurvatureError as e:
            raise CurvatureError(f"item {query.id!r}: {e}") from None
        found[query.id] = one[behaviour.name]
    return found


def check_items(queries: Sequence[Query]) -> None:
    """
    Raises:
        CurvatureError: there is no item, or two have one id, which would be one name for two rows of a test vector.
    """
    if not queries:
        raise CurvatureError("there is no test item to take a gradient of")
    times = Counter(query.id for query in queries)
    if doubled := [name for name, n in times.items() if n > 1]:
        raise CurvatureError(f"{times[doubled[0]]} test items have the id {doubled[0]!r}; give each its own")
