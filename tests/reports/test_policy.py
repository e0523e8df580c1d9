"""The Content-Security-Policy of every page: only its own style sheet and script, by hash; tried in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from importlib import resources

import pytest

from curate.reports import report, retrain, trace
from tests.reports import browser
from tests.reports.sample import sample
from tests.reports.sweep_sample import sweep
from tests.reports.trace_sample import trace as traced

PAGES = {
    "report": lambda: report.build(sample()),
    "retrain": lambda: retrain.build(sweep()),
    "trace": lambda: trace.build(traced()),
}


class Parsed(HTMLParser):
    """The policy, the text of style and script elements, and all attributes, as a browser's parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.policy: list[str] = []
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self.attributes: set[str] = set()
        self.inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.attributes |= set(given)
        if given.get("http-equiv", "").lower() == "content-security-policy":
            self.policy.append(given["content"])
        self.inside = tag if tag in self.texts else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside].append(data)


@pytest.fixture(scope="module", params=list(PAGES))
def page(request) -> str:
    return PAGES[request.param]()


def test_it_names_its_own_style_and_script_and_nothing_else(page):
    found = Parsed(page)
    (policy,) = found.policy
    rules = {r.split()[0]: r.split()[1:] for r in policy.split(";")}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    for directive, element in (("style-src", "style"), ("script-src", "script")):
        hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in found.texts[element]]
        assert rules.get(directive, []) == [f"'sha256-{h}'" for h in hashes]
    assert len(found.texts["style"]) == 1
    assert not [a for a in found.attributes if a == "style" or a.startswith("on")]


def test_every_template_of_a_page_takes_its_head_from_the_one_place():
    for file in resources.files("curate.reports").iterdir():
        if not file.name.endswith(".html.j2") or "<html" not in (text := file.read_text()):
            continue
        assert "{{ part.head(" in text, file.name
        assert not re.search(r"<head>|<script|<style|http-equiv|\sstyle=|\son[a-z]+=|javascript:", text), file.name


INJECTED = """
<script>document.title = 'owned'</script>
<style>body { --owned: yes }</style>
<p id="attribute" style="--owned: yes" onclick="document.title = 'owned'">press</p>
<svg><script>document.title = 'owned'</script></svg>
<img src="https://example.invalid/pixel.png" onerror="document.title = 'owned'">
"""


@pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("name", ["report", "trace"])
def test_what_was_injected_neither_runs_nor_styles_nor_loads(name, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGES[name]().replace("</main>", INJECTED + "</main>"), encoding="utf-8")
    scripts = {
        "press": "document.querySelector('#attribute').click()",
        "title": "document.title",
        "body": "getComputedStyle(document.body).getPropertyValue('--owned')",
        "attribute": "getComputedStyle(document.querySelector('#attribute')).getPropertyValue('--owned')",
        "own": "getComputedStyle(document.body).getPropertyValue('--ink').trim()",
    }
    seen = browser.look(path, scripts)
    assert "owned" not in seen["title"]
    assert seen["body"] == seen["attribute"] == ""
    assert seen["own"], "the page's own style sheet was not applied"
    said = " ".join(str(c) for c in seen["complaints"])
    for refused in ("inline script", "inline style", "inline event handler", "example.invalid"):
        assert refused in said
