"""The benchmark of latent influence on a tiny model: its own writing of the recipe finds what every backend finds."""

from __future__ import annotations

import json

import pytest
import torch

from bench import latents
from curate.scoring.latent.make import BACKENDS
from tests.tiny import save_tiny


def test_every_side_is_measured_and_finds_one_influence(tmp_path, capsys, monkeypatch):
    threads, path = torch.get_num_threads(), save_tiny(tmp_path / "model")
    sizes = ["--layer", "1", "--latents", "40", "--k", "4", "--scaling", "20", "80", "--rows", "1", "--items", "2"]
    given = ["--model", str(path), "--pairs", "1", "--hessian-rows", "1", *sizes]

    def here(side, arguments):
        args = latents._parser().parse_args(arguments)
        args.side = side
        return json.loads(json.dumps(latents._SIDES[side](args)))

    monkeypatch.setattr(latents, "_child", here)
    try:
        latents.main(given)
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["metric"]: line for line in lines}
    whole = found["paper.pair.seconds"]["value"]
    assert whole == pytest.approx(
        found["paper.pair_alone.seconds"]["value"] + 20 * found["paper.product_alone.seconds"]["value"], rel=1e-3
    )
    for name in BACKENDS:
        gap = found[f"{name}.largest_relative_difference"]["value"]
        assert gap < (0.05 if name == "difference" else 1e-4)
        amortised = found[f"{name}.pair_amortised.seconds"]
        assert amortised["ratio"] == pytest.approx(amortised["value"] / whole, rel=1e-3)
        assert found[f"{name}.pair_amortised.speedup"]["value"] == pytest.approx(1 / amortised["ratio"], rel=1e-3)
        assert set(found[f"{name}.by_latents.seconds"]["value"]) == {"20", "80"}
    assert lines[0]["settings"]["autoencoder"] == "TopK, random weights"
