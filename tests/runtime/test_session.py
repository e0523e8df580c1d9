"""Sessions: what the settings of a cluster come to."""

from __future__ import annotations

import pytest
import ray
import torch

from curate.errors import WorkerError
from curate.runtime.cluster import ClusterSpec
from curate.runtime.session import session


@pytest.mark.parametrize(
    ("gpus", "forward", "gradients", "expected"),
    [
        (0, None, None, (1024, 1024)),
        (0, 300, None, (300, 300)),
        (1, None, None, (65536, 8192)),
        (1, 4, None, (4, 1)),
        (1, 4000, 900, (4000, 900)),
        (0, None, 64, (1024, 64)),
    ],
)
def test_where_gradients_are_taken_a_gpu_is_given_an_eighth_of_the_tokens(
    monkeypatch, gpus, forward, gradients, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    spec = ClusterSpec(address="inline", cpus=1, token_budget=forward, gradient_token_budget=gradients)
    with session(spec) as here:
        assert (here.token_budget, here.gradient_token_budget) == expected


def test_a_machine_too_busy_to_start_ray_is_told_in_words(monkeypatch):
    def late(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(WorkerError, match=r"did not start on this machine within its 30 seconds.*cluster=existing"):
        with session(ClusterSpec()):
            pass
