"""The page of an SAE sweep: what it says, safely, and that it fits a desk and a phone."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from curate.evaluation.base import Measure, Metric
from curate.evaluation.sae_insertion import LayerResult, LayerSweep, Quality
from curate.reports.sae_layers import build
from curate.training.sae_settings import SaeSettings
from tests.reports import browser
from tests.reports.test_page_in_browser import PALE, STICKING_OUT
from tests.reports.test_report import outline

FACTS = {"settings": asdict(SaeSettings()), "rows": 4957, "model": {"name": "Llama 20x576", "adapter": "ab12"}}
ACCURACY = Metric("accuracy", "Accuracy", "capability", 0.0, 1.0)


def sweep(chosen: int = 11, best: int = 18, metric: Metric = ACCURACY) -> LayerSweep:
    """Layers 2 to 18 of a model of 20 blocks."""
    layers = []
    for layer in range(2, 19):
        fall = 0.4 * abs(layer - 11) / 9 + 0.02 if layer < 18 else 0.005
        quality = Quality(0.9 - layer / 90, 0.7 - layer / 60, 64.0, layer / 100, 7000)
        curve = tuple((t, float(0.2 + np.exp(-t / 2e5))) for t in range(10_000, 1_000_000, 20_000))
        measures = [Measure(v, v - 0.03, v + 0.03, 500, 2) for v in (0.62, 0.62 - fall, fall)]
        layers.append(LayerResult(layer, f"store/saes/{layer}", *measures, quality, {"seconds": 61.0}, curve))
    return LayerSweep("multiple_choice", metric, (5, 15), tuple(layers), chosen, best, FACTS)


def test_it_says_which_layer_and_at_what_cost():
    found = sweep()
    page = build(found, "OpenBookQA")
    out = outline(page)
    assert not out.elements & {"script", "img", "iframe", "object", "embed", "link"}
    assert (
        "Layer 11 is chosen: within the middle half its SAE changes what the model does the least. Accuracy is 0.62"
        in out.text
    )
    assert "The best of all layers that were tried is layer 18" in out.text
    assert "17 layers, 2 to 18 · middle half 5 to 15" in out.text
    assert "topk, 64 of 2,048 latents active" in out.text
    assert "its adapter merged" in out.text
    for r in found.layers:
        assert f"{r.quality.explained_variance:.3f}" in out.text
    assert build(found, "OpenBookQA") == page


def test_the_words_follow_the_numbers():
    outside = outline(build(sweep(18, 18), "x")).text
    assert "none of the layers that were tried lies in the middle half" in outside
    assert "The best of all layers" not in outside
    found = sweep(metric=Metric("loss", "Held-out loss", "loss"))
    unsure = tuple(replace(r, drop=Measure(0.01, -0.02, 0.04, 500, 0)) for r in found.layers)
    loss = outline(build(replace(found, layers=unsure), "x")).text
    assert "rise of multiple_choice.loss by insertion" in loss
    assert "does not tell from none" in loss


def test_one_layer_without_intervals_or_curve_and_foreign_text():
    bad = "<img src=x>\u202e"
    one = replace(sweep().layers[9], drop=Measure(0.1, None, None, 1, 0), curve=())
    page = build(LayerSweep(bad, Metric(bad, bad, "capability"), (5, 15), (one,), 11, 11), bad)
    out = outline(page)
    assert "img" not in out.elements
    assert "\u202e" not in page
    assert "Training" not in out.text


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_fits_its_window_and_can_be_read(tmp_path, width, dark):
    page = tmp_path / "sae.html"
    page.write_text(build(sweep(), "SAEs of the demo"), encoding="utf-8")
    seen = browser.look(page, {"out": STICKING_OUT, "pale": PALE}, width=width, dark=dark)
    assert seen["out"] == []
    assert seen["pale"] == []
    assert seen["complaints"] == []
