"""The benchmark of sweeps runs, and its figures are of the work that it says."""

from __future__ import annotations

import json

import pytest

from bench import sweep
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow


def test_training_is_measured_against_the_plain_loop(tmp_path, capfd):
    model = save_tiny(tmp_path / "model")
    small = ["--rows", "24", "--max-tokens", "1500", "--dtype", "float32", "--rounds", "1"]
    sweep.main(["--series", "training", "--model", str(model), *small])
    (line,) = [json.loads(x) for x in capfd.readouterr().out.splitlines() if x.startswith("{")]
    assert line["metric"] == "training_tokens_per_second"
    assert set(line["value"]) == {"plain", "trainer"}
    assert line["ratio"] == pytest.approx(line["value"]["trainer"] / line["value"]["plain"], rel=1e-3)
    assert line["against"] == "plain"
