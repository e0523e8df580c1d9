"""The report: one HTML file that needs no network, no script and no other file.

In: ReportData. Out: the page as text, or written to a URL. All foreign text passes through `visible`, which escapes
it and marks hidden characters; a Content-Security-Policy forbids the page to load or run anything, and to apply any
style but its own sheet, which is named by its hash.
Knows no model, no cluster and no corpus format.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from connectors.storage import write_atomic
from curate.reports import text
from curate.reports.data import ReportData
from curate.reports.view import context


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Templates of this folder, with the filters that make foreign text safe."""
    found = Environment(
        loader=PackageLoader("curate.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    strings = (text.visible, text.breakable, text.plain, text.short)
    numbers = (text.whole, text.percent, text.number, text.fixed, text.duration)
    for function in strings + numbers:
        found.filters[function.__name__] = function
    return found


def policy(style: str, script: str | None = None) -> str:
    """The Content-Security-Policy of a page: nothing but this style sheet and, where there is one, this script.

    Both are named by their SHA-256 as they stand between their tags; attributes (`style=`, `onclick=`) are refused.
    """

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = [f"style-src {source(style)}", *([f"script-src {source(script)}"] if script else [])]
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])


def rendered(
    template: str, context: Mapping[str, Any], styles: Sequence[str] = ("page.css",), script: str | None = None
) -> str:
    """A page from a template of this folder, which begins with `{% import "parts.html.j2" as part with context %}` and
    has `{{ part.head(title) }}` for its head, and `{{ part.script() }}` last in its body where it has a script.

    `styles` and `script` name files of this folder; they are the only ones that the page may apply or run.
    """
    folder = resources.files("curate.reports")
    style = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in styles)
    code = folder.joinpath(script).read_text(encoding="utf-8") if script else None
    own = {"style": Markup(style), "code": Markup(code) if code else None, "policy": Markup(policy(style, code))}
    return environment().get_template(template).render(**context, **own)


def build(data: ReportData) -> str:
    """The whole page. The same data gives the same text, byte for byte."""
    return rendered("page.html.j2", context(data))


def write(url: str, data: ReportData) -> None:
    """Write the page to `url` (any fsspec URL), whole or not at all.

    Raises:
        StorageError: the place cannot be written; the message names it and the reason.
    """
    write_atomic(url, build(data).encode("utf-8"))
