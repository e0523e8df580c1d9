"""Which cluster, and how large its pools: settings alone, without Ray, so that a config can be checked before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClusterSpec:
    """See conf/cluster/*.yaml for the meaning of each field."""

    address: Literal["local", "existing", "inline"] = "local"
    ray_address: str = "auto"
    cpus: int | None = None
    gpus: int | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    engine_workers: int | None = None
    engine_cpus: float | None = None
    engine_gpus: float | None = None
    readers: int | None = None
    reader_cpus: float = 0.25
    object_store_gb: float | None = None
    wait_seconds: float = 900.0
    token_budget: int | None = None
    gradient_token_budget: int | None = None
    peak_tflops: float | None = None
