"""The pages of `curate latents` and `curate groups`: what they say, that foreign text does no harm, how they look."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from curate.reports import groups, latents
from curate.reports.group_plots import thinned
from curate.reports.groups import GroupsPage, GroupView
from curate.reports.latents import LatentsPage, SeparatingLatent
from curate.reports.passages import Passage
from curate.selection.groups import Curve
from tests.reports import browser
from tests.reports.test_page_in_browser import PALE, STICKING_OUT

HOSTILE = "</div><script>alert(1)</script>\u202e" + "x" * 300
FACTS = (("SAE", "planted: layer 2, 24 latents, relu"), ("model", HOSTILE[:40]))


def passage(i: int, set_: str = "") -> Passage:
    return Passage("before ", f" tok{i}", HOSTILE, 1.5 + i, f"r{i}", "a.jsonl", i, "marked", set_)


def curve(n: int, start: float = 0.05) -> Curve:
    covered = np.linspace(start, 1, n)
    return Curve(np.arange(1, n + 1), covered, np.linspace(0.9, 0.25, n), np.linspace(0.1, 1, n))


def latents_page() -> LatentsPage:
    listed = [
        SeparatingLatent(j, 0.9 - j / 50, 0.001, 1.2, 0.8, 0.1, 0.5, 0.1, 0.75, f"planted-{j}",
                         tuple(passage(i, "positive") for i in range(2)))
        for j in range(3)
    ]  # fmt: skip
    return LatentsPage(HOSTILE, (("marked", 20), (HOSTILE, 80)), "max", 24, 2, listed, "s3://b/concepts", FACTS)


def groups_page() -> GroupsPage:
    names = ("plain", "marked", HOSTILE, "l3", "l4", "l5", "l6")
    listed = [
        GroupView(j, j + 1, 0.5 - j / 10, 20, 20 - j, j < 2, tuple((n, 2) for n in names), (passage(j),))
        for j in range(4)
    ]
    return GroupsPage(
        title=HOSTILE, column="vector_filter.test.L2", rule="remove_most whole groups", threshold=0.1,
        aggregate="mean", most=True, fraction=0.1, rows=100, groups=30, removed_groups=2, removed_rows=12,
        removed_bad=9, bad_label="marked", bad_rows=25, base_rate=0.25, labels=names, influence=curve(30),
        rows_curve=curve(100, 0.01), random=[curve(30, 0.03 + k / 50) for k in range(5)], listed=listed,
        written="s3://b/groups", facts=FACTS,
    )  # fmt: skip


PAGES = {"latents": lambda: latents.build(latents_page()), "groups": lambda: groups.build(groups_page())}


@pytest.mark.parametrize("name", PAGES)
def test_the_same_data_gives_the_same_safe_page(name):
    text = PAGES[name]()
    assert text == PAGES[name]()
    assert "<script" not in text
    assert "\u202e" not in text
    assert not re.findall(r"(?:src|href)=\"(?!#)", text)
    assert "default-src 'none'" in text


def test_what_the_pages_say():
    text = re.sub(r"<[^>]+>|\s+", " ", PAGES["latents"]())
    assert "2 of 24 latents tell the two sets apart beyond chance" in re.sub(r"\s+", " ", text)
    none = latents.build(replace(latents_page(), significant=0))
    assert "<strong>None</strong> of 24" in none
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", PAGES["groups"]()))
    assert "Taking the 2 groups of the highest influence removes 12 of 100 rows (12.0%)" in text
    assert "9 of them have the label “marked”: 75.0%, where 25.0% of all rows have it." in text
    assert text.count(" removed ") >= 2


def test_groups_without_labels_or_draws():
    page = replace(groups_page(), removed_bad=None, bad_label=None, bad_rows=None, base_rate=None, labels=(), random=[],
                   listed=[replace(g, labels=(), passages=()) for g in groups_page().listed], most=False)  # fmt: skip
    text = groups.build(page)
    assert "there is no curve of precision" in text
    assert "of the lowest influence" in text
    assert "labels of the members" not in text


def test_long_curves_are_thinned_and_keep_their_ends():
    for n in (1, 2, 400, 401, 10**6):
        at = thinned(n)
        assert len(at) <= 400
        assert (at[0], at[-1]) == (0, n - 1)
        assert (np.diff(at) > 0).all()


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("name", PAGES)
def test_the_pages_fit_their_window_and_can_be_read(name, tmp_path):
    page = Path(tmp_path / f"{name}.html")
    page.write_text(PAGES[name](), encoding="utf-8")
    for width, dark in ((1280, False), (390, True)):
        scripts = {"out": STICKING_OUT, "pale": PALE, "width": "document.documentElement.scrollWidth"}
        seen = browser.look(page, scripts, width=width, dark=dark)
        assert seen["out"] == []
        assert seen["pale"] == []
        assert seen["width"] <= width
        assert seen["requests"] == [page.as_uri()]
        assert seen["complaints"] == []
