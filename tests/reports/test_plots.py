"""Pictures: well-formed, coloured by the page, without identifiers that collide, scripts or foreign text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from curate.reports import plots


def normal(n: int = 500, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(1).normal(size=n) + shift


def distribution(name: str = "h", **changes) -> str:
    settings = {"cut": 0.5, "dropped_above": True, "share": True, "name": name, "alt": "a < b"} | changes
    return plots.distribution([plots.Series(normal(), None, 0), plots.Series(normal(80, 1), None, 1)], **settings)


def pictures() -> dict[str, str]:
    recall = np.linspace(0, 1, 20)
    return {
        "distribution": distribution(),
        "curves": plots.pr_curves([plots.Series(recall, 1 - recall / 2, 0)], 0.3, (0.5, 0.7), "pr", "curve"),
        "profile": plots.layer_profile([(0, 1.0, 0.5), (1, 2.0, 0.8), (2, 3.0, None)], 1, "c", "profile"),
        "norms": plots.layer_profile([(0, 1.0, None), (1, 2.0, None)], None, "d", "profile"),
    }


@pytest.mark.parametrize("name", ["distribution", "curves", "profile", "norms"])
def test_a_picture_is_plain_svg_with_the_pages_colours(name):
    picture = pictures()[name]
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("role") == "img"
    assert not re.search(r"<(script|style|image|foreignObject)|<metadata", picture)
    assert "var(--ink)" in picture
    assert "#0102" not in picture
    colours = set(re.findall(r"#[0-9a-f]{6}\b", picture))
    assert colours <= {"#ffffff"}, "a fixed colour would not follow the dark page"
    assert "font-family" not in picture
    assert set(re.findall(r'href="([^"]*)"', picture)) <= set(re.findall(r'href="(#[^"]*)"', picture))


def test_identifiers_of_two_pictures_do_not_collide():
    ids = [set(re.findall(r'\bid="([^"]+)"', distribution(name))) for name in ("first", "second")]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', distribution("first")))
    assert used <= ids[0]


def test_the_same_data_gives_the_same_picture():
    assert distribution() == distribution()


@pytest.mark.parametrize(("above", "left", "right"), [(True, "kept", "dropped"), (False, "dropped", "kept")])
def test_the_cut_says_which_side_was_dropped(above, left, right):
    picture = distribution(dropped_above=above)
    assert f"← {left}" in picture
    assert f"{right} →" in picture


def test_a_cut_outside_the_picture_is_not_drawn():
    assert "dropped" not in distribution(cut=1e9)


def test_one_outlier_does_not_flatten_the_histogram():
    values = np.append(normal(10_000), 1e6)
    edges = plots.histogram_edges(values)
    inside = ((values >= edges[0]) & (values <= edges[-1])).mean()
    assert edges[-1] < 20
    assert inside > 0.99


def test_extremes_that_are_near_stay_inside():
    values = normal(300)
    edges = plots.histogram_edges(values)
    assert edges[0] <= values.min()
    assert edges[-1] >= values.max()


@pytest.mark.parametrize("values", [np.array([3.0]), np.full(50, -2.0), np.array([0.0, 1e-12])])
def test_values_without_spread_have_bins(values):
    edges = plots.histogram_edges(values)
    assert (np.diff(edges) > 0).all()
    plots.distribution([plots.Series(values, None, 0)], None, None, False, "x", "x")


def test_all_rows_are_counted_somewhere():
    values = np.append(normal(5000), [50.0, -80.0])
    edges = plots.histogram_edges(values)
    assert np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].sum() == len(values)
