"""Accelerators: which kinds of GPU the running cluster has, and how many actors of a pool fit on one kind.

In: a pool. Out: Ray's names of kinds with the places there are. Knows no work.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import ray

from curate.runtime.session import Pool

_RESOURCE = "accelerator_type:"


def places(pool: Pool) -> Counter[str]:
    """By kind of GPU: how many actors of `pool` fit on the nodes that have it. Empty without GPUs, or if no kind is
    known."""
    found: Counter[str] = Counter()
    if not pool.gpus:
        return found
    for node in ray.nodes():
        have = node["Resources"] if node["Alive"] else {}
        for name in have:
            if name.startswith(_RESOURCE):
                fit = have.get("GPU", 0) / pool.gpus, have.get("CPU", 0) / max(pool.cpus, 1e-9)
                found[name.removeprefix(_RESOURCE)] += int(min(fit))
    return found


def held_to(pool: Pool, kind: str | None) -> Pool:
    """`pool` with no more actors than fit on GPUs of `kind`: one that does not fit would never start."""
    if kind is None or not pool.gpus:
        return pool
    return replace(pool, size=max(1, min(pool.size, places(pool)[kind])))
