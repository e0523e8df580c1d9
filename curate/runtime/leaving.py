"""What is at work when a stage ends in an error, or is left early: it ends what it has begun, in a set time.

In: calls of actors. Out: those that were not done in time, whose actors the caller kills. Else one would still commit,
or leave a half file, when the caller has long been told that the stage has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import ray

from curate.runtime.events import say

GRACE_S = 30.0
"""What workers get to end and commit what they were given."""


def let_end(calls: Sequence[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """Wait until `calls` are done, GRACE_S at most; returns the others."""
    late = list(calls)
    with suppress(ray.exceptions.RayError):  # a cluster that is gone itself; what ended the stage is to be told
        late = _wait(late, 1.0)
        if late:
            say(f"waiting for workers to end what they have begun, {GRACE_S:.0f} s at most", workers=len(late))
            late = _wait(late, GRACE_S)
        return late
    return []


def _wait(calls: list[ray.ObjectRef], seconds: float) -> list[ray.ObjectRef]:
    return ray.wait(calls, num_returns=len(calls), timeout=seconds)[1] if calls else []
