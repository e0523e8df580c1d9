"""The page of a layer-stride study: what it says, safely, and that it fits a desk and a phone."""

from __future__ import annotations

import numpy as np
import pytest

from curate.evaluation.layer_stride import LayerStrides, layer_strides
from curate.reports.layer_stride import build
from tests.reports import browser
from tests.reports.test_page_in_browser import PALE, STICKING_OUT
from tests.reports.test_report import outline

NAMES = (
    "influence_function.contrast",
    "concept_influence.sycophantic.contrast.L15.last_prompt_token",
    "gradient_product.sycophantic.L15",
)


def study(names: tuple[str, ...] = NAMES) -> LayerStrides:
    """Scores whose strides agree less and less from column to column."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(300, 1, 1))
    spread = np.linspace(0.3, 1.8, len(names))[None, :, None]
    return layer_strides(common + spread * rng.normal(size=(300, len(names), 20)), names)


def test_it_says_how_far_each_score_may_be_strided():
    found = study()
    page = build(found, "Demo")
    out = outline(page)
    assert not out.elements & {"script", "img", "iframe", "object", "embed", "link"}
    assert "300 rows · 20 tracked blocks, 0 to 19" in out.text
    assert page.count("<svg") >= 2
    for name, largest in zip(NAMES, found.largest(), strict=True):
        assert f"{name} up to stride {largest}" in out.text
    for s in found.strides:
        for value in s.correlation:
            assert f"{value:.3f}" in out.text
    assert build(found, "Demo") == page


def test_the_lead_follows_the_numbers():
    assert "the rank correlation of at least one score falls below 0.99" in outline(build(study(), "x", 0.99)).text
    assert "Tracking one block in 12 would rank" in outline(build(study(NAMES[:1]), "x", 0.5)).text


def test_foreign_names_are_escaped_and_missing_correlations_are_dashes():
    bad = "<img src=x>\u202e"
    by_block = np.random.default_rng(0).normal(size=(9, 2, 4))
    by_block[:, 1] = 1.0
    page = build(layer_strides(by_block, [bad, "same"]), bad)
    out = outline(page)
    assert "img" not in out.elements
    assert "\u202e" not in page
    assert "–" in out.text


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_fits_its_window_and_can_be_read(tmp_path, width, dark):
    page = tmp_path / "stride.html"
    page.write_text(build(study(), "Curation of the demo"), encoding="utf-8")
    seen = browser.look(page, {"out": STICKING_OUT, "pale": PALE}, width=width, dark=dark)
    assert seen["out"] == []
    assert seen["pale"] == []
    assert seen["complaints"] == []
