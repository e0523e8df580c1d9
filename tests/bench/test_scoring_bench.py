"""The scoring benchmark's output, on a tiny model; what it measures of a real one is no test."""

from __future__ import annotations

import json

import pytest
import torch

from bench import scoring
from tests.tiny import save_tiny


def test_every_backend_is_measured_and_finds_one_score(tmp_path, capsys):
    threads = torch.get_num_threads()
    path = save_tiny(tmp_path / "model")
    arguments = ["--rows", "4", "--queries", "1", "2", "--repetitions", "1", "--last", "3", "--layer", "2"]
    try:
        scoring.main(["--model", str(path), *arguments])
    finally:
        torch.set_num_threads(threads)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    against = {(line["metric"], line["against"]): line for line in found}
    for backend in ("contraction", "forward", "difference"):
        for count in (1, 2):
            line = against[f"{backend}.{count}.seconds", "plain"]
            plain = against["plain.seconds", "plain_response_logits"]
            assert line["ratio"] == pytest.approx(line["value"] / plain["value"], rel=1e-3)
            if backend != "contraction":
                gap = against[f"{backend}.{count}.largest_relative_difference", None]["value"]
                assert gap < (1e-4 if backend == "forward" else 0.02)
        assert against[f"concept_influence.{backend}.seconds", "vector_filter"]["ratio"] > 0
    assert found[0]["settings"]["response_tokens"] < found[0]["settings"]["tokens"]
