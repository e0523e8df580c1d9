"""The page in a real browser: layout at desktop and phone width, dark mode, print, and that nothing runs or loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.reports.report import build
from tests.reports import browser
from tests.reports.sample import sample

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")

# Elements that stick out to the right of the page, but for what scrolls by itself.
STICKING_OUT = """[...document.querySelectorAll('main *')]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .filter(e => !e.closest('.scroll') && !e.closest('svg'))
  .map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 60))"""
OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true })"
SHOWN = """Object.fromEntries(['.wide', '.narrow'].map(s =>
  [s, [...document.querySelectorAll(s)].filter(e => e.getBoundingClientRect().height > 0).length]))"""
# Text whose contrast with what lies behind it is below 4.5 (WCAG AA).
PALE = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const luminance = c => { const v = c.slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const behind = e => { const layers = [];
    for (let n = e; n; n = n.parentElement) { const c = rgb(getComputedStyle(n).backgroundColor);
      if (c[3] > 0) layers.push(c); if (c[3] === 255) break; }
    return layers.reverse().reduce((under, c) => under.map((u, i) => u + (c[i] - u) * c[3] / 255), [255, 255, 255]); };
  const out = new Set();
  for (const e of document.querySelectorAll('main *')) {
    const svg = e.closest('svg');
    if (svg ? e.tagName !== 'text' : ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const ink = rgb(svg ? getComputedStyle(e).fill : getComputedStyle(e).color);
    const [a, b] = [luminance(ink), luminance(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) out.add(`${e.tagName}.${e.getAttribute('class')} ${ratio.toFixed(2)}`);
  }
  return [...out]; })()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(build(sample()), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_window_and_can_be_read(page, width, dark):
    scripts = {"open": OPEN_ALL, "out": STICKING_OUT, "shown": SHOWN, "pale": PALE}
    scripts |= {"width": "document.documentElement.scrollWidth", "title": "document.title"}
    scripts |= {"back": "getComputedStyle(document.body).backgroundColor"}
    seen = browser.look(page, scripts, width=width, dark=dark)
    assert seen["out"] == []
    assert seen["width"] <= width
    assert seen["pale"] == []
    assert seen["title"] == "Sycophancy in the assistant corpus"
    hidden, drawn = (".narrow", ".wide") if width == 1280 else (".wide", ".narrow")
    assert seen["shown"][hidden] == 0
    assert seen["shown"][drawn] == 4  # distribution, curve, two concepts
    assert (seen["back"] == "rgb(255, 255, 255)") is not dark
    assert seen["requests"] == [page.as_uri()]
    assert seen["complaints"] == []


def test_it_prints_light_on_a_dark_screen(page, tmp_path):
    recipe = "document.querySelector('#recipe pre').getBoundingClientRect().height"
    scripts = {"back": "getComputedStyle(document.body).backgroundColor", "recipe": recipe}
    target = tmp_path / "report.pdf"
    seen = browser.look(page, scripts, width=720, dark=True, media="print", picture=target)
    assert seen["back"] == "rgb(255, 255, 255)"
    assert seen["recipe"] > 100  # folded on screen, whole on paper
    assert target.read_bytes().startswith(b"%PDF")
