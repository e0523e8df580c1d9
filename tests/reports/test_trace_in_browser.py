"""The page of a trace in a real browser: pointed at, clicked, driven by keys alone, printed, attacked, and timed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from curate.reports.trace import build
from tests.reports import browser
from tests.reports.browser import key, mouse
from tests.reports.test_page_in_browser import OPEN_ALL, PALE, STICKING_OUT
from tests.reports.trace_sample import trace

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")

EVERYTHING = "document.getElementById('open').click()"
LIT = "document.getElementById('lit').textContent"
TOKEN = "document.getElementById('token').textContent"
FOCUS = "document.activeElement.dataset.latent ?? document.activeElement.textContent.trim().slice(0, 40)"
# Tokens whose background is the colour of a lit latent.
LIGHTED = """[...document.querySelectorAll('.t')].filter(e => e.checkVisibility())
  .filter(e => /(^| )k(\\d+)[abcd]( |$)/.test(e.className))
  .filter(e => { const s = getComputedStyle(e); return s.textDecorationLine === 'underline' &&
    s.textDecorationColor === getComputedStyle(document.querySelector('.hits')).color; }).length"""


def centre(selector: str, at: int = 0) -> str:
    return f"""(() => {{ const e = document.querySelectorAll('{selector}')[{at}];
      e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();
      return [b.x + b.width / 2, b.y + b.height / 2]; }})()"""


def fires(latent: str) -> str:
    classes = ",".join(f".t.k{latent}{step}" for step in "abcd")
    return f"[...document.querySelectorAll('{classes}')].filter(e => e.checkVisibility()).length"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.html"
    path.write_text(build(trace(items=2, rows=2, curves=False)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "hostile.html"
    path.write_text(build(trace(items=1, rows=1, hostile=True)), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_fits_its_window_and_can_be_read(hostile, width, dark):
    scripts = {"all": EVERYTHING, "open": OPEN_ALL, "out": STICKING_OUT, "pale": PALE}
    scripts |= {"width": "document.documentElement.scrollWidth", "title": "document.title"}
    scripts |= {"chip": "document.querySelector('.chip').click()", "pale when lit": PALE}
    seen = browser.look(hostile, scripts, width=width, dark=dark)
    assert seen["out"] == []
    assert seen["width"] <= width
    assert seen["pale"] == []
    assert seen["pale when lit"] == []
    assert seen["title"] != "owned"
    assert seen["requests"] == [hostile.as_uri()]
    assert seen["complaints"] == []


def test_no_other_script_may_run(page):
    attack = """document.body.insertAdjacentHTML('beforeend', `<img src="data:," onerror="document.title='owned'">`);
      const s = document.createElement('script'); s.textContent = "document.title='owned'"; document.body.append(s)"""
    seen = browser.look(page, {"attack": attack, "title": "new Promise(r => setTimeout(() => r(document.title), 50))"})
    assert "owned" not in seen["title"]
    assert any("Content Security Policy" in str(c) for c in seen["complaints"])


def test_pointing_at_a_latent_lights_its_tokens_and_leaving_it_lets_go(page):
    latent = "document.querySelectorAll('.chip')[1].dataset.latent"
    seen = browser.look(
        page,
        {
            "before": LIGHTED,
            "latent": latent,
            "chip": centre(".chip", 1),
            "over": mouse("mouseMoved", "chip"),
            "lit": LIT,
            "lighted": LIGHTED,
            "away": "[5, 5]",
            "leave": mouse("mouseMoved", "away"),
            "after": LIT,
            "dark": LIGHTED,
        },
    )
    assert seen["before"] == 0
    assert seen["lit"].startswith(f"Latent {seen['latent']} is lit on ")
    assert seen["lighted"] > 0
    assert (seen["after"], seen["dark"]) == ("", 0)
    assert seen["complaints"] == []


def test_a_click_keeps_a_latent_lit_also_in_texts_that_are_opened_later(page):
    latent = "document.querySelectorAll('.chip')[0].dataset.latent"
    pressed = "[...document.querySelectorAll('.chip[aria-pressed=true]')].map(c => c.dataset.latent)"
    seen = browser.look(
        page,
        {
            "latent": latent,
            "chip": centre(".chip", 0),
            "press": mouse("mousePressed", "chip"),
            "release": mouse("mouseReleased", "chip"),
            "away": "[5, 5]",
            "leave": mouse("mouseMoved", "away"),
            "kept": LIT,
            "pressed": pressed,
            "few": LIGHTED,
            "hits": "[...document.querySelectorAll('.hits')].map(e => e.textContent).filter(t => t).length",
            "folded": "document.querySelectorAll('details.lazy > template').length",
            "all": EVERYTHING,
            "left": "document.querySelectorAll('details.lazy > template').length",
            "many": LIGHTED,
            "escape": key("Escape"),
            "after": LIT,
            "unpressed": pressed,
            "none": LIGHTED,
        },
    )
    assert f"Latent {seen['latent']} " in seen["kept"]
    assert "until Escape" in seen["kept"]
    assert "folded" in seen["kept"]
    assert set(seen["pressed"]) == {seen["latent"]}
    assert seen["hits"] >= 2
    assert seen["folded"] > 0
    assert seen["left"] == 0
    assert seen["many"] > seen["few"] > 0
    assert (seen["after"], seen["unpressed"], seen["none"]) == ("", [], 0)


def test_it_can_be_used_by_keys_alone(page):
    seen = browser.look(
        page,
        {
            "start": "document.querySelector('.item .chips').previousElementSibling.setAttribute('tabindex', '-1')",
            "focus": "document.querySelector('.item .chips').previousElementSibling.focus()",
            "tab": key("Tab"),
            "first": FOCUS,
            "first lit": LIT,
            "right": key("ArrowRight"),
            "second": FOCUS,
            "second lit": LIT,
            "end": key("End"),
            "last": FOCUS,
            "around": key("ArrowRight"),
            "first again": FOCUS,
            "enter": key("Enter"),
            "pinned": LIT,
            "tab on": key("Tab"),  # past the other chips, to the text
            "in text": "document.activeElement.className",
            "still": LIT,
            "into": key("ArrowRight"),
            "token": TOKEN,
            "label": "document.activeElement.getAttribute('aria-label')",
            "next of latent": key("ArrowDown"),
            "its latents": "document.activeElement.dataset.f.split(';').map(x => x.split(',')[0])",
            "home": key("Home"),
            "at home": "[...document.querySelector('.tokens').querySelectorAll('.t')].indexOf(document.activeElement)",
            "space": key("Space"),
            "of token": LIT,
            "escape": key("Escape"),
            "back": "document.activeElement.className",
            "dark": LIT,
            "stops": "document.querySelectorAll('.tokens [tabindex]').length",
            "names": "[...document.querySelectorAll('.item .chip')].slice(0, 2).map(c => c.dataset.latent)",
            "last name": "[...document.querySelector('.item .chips').children].pop().dataset.latent",
        },
    )
    first, second = seen["names"]
    assert (seen["first"], seen["second"], seen["last"]) == (first, second, seen["last name"])
    assert seen["first again"] == first
    assert f"Latent {first} " in seen["first lit"]
    assert f"Latent {second} " in seen["second lit"]
    assert "until Escape" in seen["pinned"]
    assert seen["in text"] == "tokens"
    assert f"Latent {first} " in seen["still"]
    assert "activation" in seen["token"]
    assert seen["label"] == seen["token"]
    assert first in seen["its latents"]
    assert seen["at home"] == 0
    assert "until Escape" in seen["of token"]
    assert (seen["back"], seen["dark"], seen["stops"]) == ("tokens", "", 0)
    assert seen["complaints"] == []


def test_intensity_can_be_of_the_whole_text(page):
    strong = """[...document.querySelectorAll('.t')].filter(e => e.checkVisibility() &&
      getComputedStyle(e).backgroundColor !== 'rgba(0, 0, 0, 0)').length"""
    seen = browser.look(
        page,
        {
            "sentence": strong,
            "switch": "document.querySelector('input[value=text]').click()",
            "text": strong,
        },
    )
    assert 0 < seen["text"] < seen["sentence"]


def test_controls_have_names_and_roles(page):
    nameless = """[...document.querySelectorAll('button, [role=toolbar], [role=group], [role=region], .tokens')]
      .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim())).length"""
    seen = browser.look(
        page,
        {
            "nameless": nameless,
            "live": "document.querySelector('[role=status]').getAttribute('aria-live')",
            "nested": "document.querySelectorAll('summary button, summary a, button button').length",
            "stops": "[...document.querySelectorAll('.chips')].map(t => t.querySelectorAll('[tabindex=\"-1\"]').length"
            " === t.children.length - 1).every(x => x)",
        },
    )
    assert (seen["nameless"], seen["live"], seen["nested"], seen["stops"]) == (0, "polite", 0, True)


def test_thousands_of_tokens_are_lit_without_lag(tmp_path):
    """Time of the page's own thread on a processor, so that a busy machine does not count."""
    path = tmp_path / "large.html"
    path.write_text(build(trace(items=4, rows=5, tokens=400, curves=False)), encoding="utf-8")
    drawn = "document.body.offsetHeight; getComputedStyle(document.querySelector('.t')).backgroundColor"
    scripts: dict[str, browser.Step] = {
        "timing": ("Performance.enable", {"timeDomain": "threadTicks"}),
        "all": EVERYTHING,
        "tokens": "document.querySelectorAll('.t').length",
    }
    for i in range(9):
        chip = f"document.querySelectorAll('.item .chip')[{i}]"
        over = f"{chip}.dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))"
        scripts |= {f"over {i}": f"{over}; {drawn}", f"spent {i}": ("Performance.getMetrics", {})}
    seen = browser.look(path, scripts)
    spent = [next(m["value"] for m in seen[f"spent {i}"]["metrics"] if m["name"] == "TaskDuration") for i in range(9)]
    times = sorted(1000 * (b - a) for a, b in pairwise(spent))
    print(f"{seen['tokens']} tokens with latents; a latent lit in {times[len(times) // 2]:.0f} ms")
    assert seen["tokens"] > 5000
    assert times[len(times) // 2] < 60
    assert seen["complaints"] == []


def test_it_prints_what_is_open_light_on_a_dark_screen(page, tmp_path):
    target = tmp_path / "trace.pdf"
    scripts = {
        "back": "getComputedStyle(document.body).backgroundColor",
        "bar": "getComputedStyle(document.getElementById('bar')).display",
        "colours": "getComputedStyle(document.querySelector('.t')).printColorAdjust",
    }
    seen = browser.look(page, scripts, width=720, dark=True, media="print", picture=target)
    assert (seen["back"], seen["bar"], seen["colours"]) == ("rgb(255, 255, 255)", "none", "exact")
    assert target.read_bytes().startswith(b"%PDF")
