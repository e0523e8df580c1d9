"""Memory of a worker's device: how much is free, and what to say when it was too little.

In: a device; a block of work. Out: bytes; WorkerError in the place of PyTorch's. Knows no model and no method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from curate.errors import WorkerError


def free_bytes(device: torch.device) -> int:
    """What can still be allocated: on a GPU, PyTorch's own unused cache in it; else the machine's available memory."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


@contextmanager
def out_of_memory_in_words() -> Iterator[None]:
    """
    Raises:
        WorkerError: in the place of torch.OutOfMemoryError, with the settings that need less.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise WorkerError(
            f"a worker's device is out of memory ({str(e).split('. ')[0]}). Lower cluster.gradient_token_budget (fits "
            f"and influence scores) or cluster.token_budget (other scores): padded tokens in a batch. "
            f"If one row is too long alone, lower source.max_tokens or curvature.max_tokens; scores do not depend on "
            f"the budgets. What was committed stays; the same command goes on from there."
        ) from e
