"""Waiting for a cluster to be large enough, on the suite's Ray of two CPUs."""

from __future__ import annotations

import pytest

from curate.errors import ConfigError
from curate.runtime.scaling import at_least


def test_what_is_there_is_not_waited_for(running, capsys):
    with at_least(2, None, seconds=30.0):
        pass
    with at_least(None, None, seconds=30.0):
        pass
    assert "waiting for the cluster" not in capsys.readouterr().err


def test_a_cluster_that_stays_small_is_an_error_with_its_size(running):
    with pytest.raises(ConfigError, match=r"after 0 s the cluster has 2 of 64 CPUs, 0 of 8 GPUs\. Lower cluster\.cpus"):
        with at_least(64, 8, seconds=0.0):
            pass
