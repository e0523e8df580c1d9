"""The page of a trace: its data as JSON, colours of tokens, escaping, its policy, what it says of faithfulness."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from connectors.storage import read_text
from curate.errors import ConfigError, StorageError
from curate.evaluation.masking import Contrast
from curate.evaluation.ranking import Estimate
from curate.reports.trace import build, write
from curate.reports.trace_data import Firing, TokenText, TraceData, dumps, loads
from curate.reports.trace_faithfulness import faithfulness, verdict
from curate.reports.trace_tokens import COLOURS, MAX_FIRING, MAX_TOKENS, context, palette, sentences, shown
from tests.reports.trace_sample import HOSTILE, masked, text, trace

SPAN = re.compile(r'<span class="t ([^"]*)"(?: data-n="(\d)")? data-f="([^"]*)">(.*?)</span>', re.S)


def bare(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


class Attributes(HTMLParser):
    """The names of all elements' attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {name for name, _ in attrs}


def simple(*tokens: tuple[str, dict[int, float]], start: int = 0) -> TokenText:
    firing = tuple(tuple(Firing(k, a) for k, a in fires.items()) for _, fires in tokens)
    return TokenText(tuple(t for t, _ in tokens), firing, start, len(tokens))


def spans(found) -> dict[str, tuple[str, str | None, str]]:
    """By text: (classes, number, what is told)."""
    whole = "".join(s.html for s in found.segments)
    return {bare(piece): (names, number or None, told) for names, number, told, piece in SPAN.findall(whole)}


@pytest.fixture(scope="module")
def page() -> str:
    return build(trace())


def test_json_round_trip():
    for data in (trace(), trace(hostile=True), replace(trace(), faithfulness=None, orthogonality=(), accuracy=())):
        assert loads(dumps(data)) == data


def test_data_that_do_not_fit_are_refused():
    data = trace(items=1, rows=1, tokens=8)
    item = data.items[0]
    row, found = item.rows[0], item.text
    for items, message in (
        ((item, item), "two test items"),
        ((replace(item, text=replace(found, firing=found.firing[1:])),), "8 tokens but latents for 7"),
        ((replace(item, text=replace(found, stop=99)),), r"response of test item 'item-0' is \[2, 99\)"),
        ((replace(item, latents=((0, float("nan")),)),), "test item 'item-0' holds nan"),
        ((replace(item, rows=(replace(row, score=float("inf")),)),), "row 'row-0-0' of test item 'item-0' holds inf"),
        ((replace(item, text=simple(("a", {0: float("nan")}))),), "holds nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(data, items=items)
    with pytest.raises(ConfigError, match=r"trace\.json is not the report of a trace: at title"):
        loads('{"created": "x"}', "trace.json")


def test_a_tokens_colour_is_the_latent_with_the_largest_activation_times_influence():
    found = simple(("a", {1: 4.0, 2: 1.0}), (" b", {1: 1.0, 2: 3.0}), (" c", {}), (" d", {3: 9.0}), (" e", {2: 2.0}))
    got = shown(found, {1: 0.5, 2: -1.0}, {1: 1, 2: 2})
    by = spans(got)
    assert set(by) == {"a", "b", "e"}  # no influence is known of latent 3
    assert by["a"][0].split()[:3] == ["c1", "i3", "j3"]  # 2.0 of 3.0
    assert by["b"][0].split()[:4] == ["c2", "i4", "j4", "m"]  # a negative influence
    assert by["e"][0].split()[:4] == ["c2", "i3", "j3", "m"]
    assert (by["a"][1], by["b"][1], by["e"][1]) == ("1", "2", "2")
    assert by["a"][2] == "1,4,2,;2,1,-1,"
    assert {"k1d", "k2b"} <= set(by["a"][0].split())  # 4 of 4; 1 of 3
    assert bare("".join(s.html for s in got.segments)) == "a b c d e"
    assert (got.counts, got.tokens, got.plain) == ({1: 2, 2: 3}, 5, False)


def test_the_number_stands_once_in_a_run_and_intensity_is_of_the_sentence():
    weak = [(f" w{i}", {1: 0.1}) for i in range(6)]
    strong = [(f" s{i}", {1: 1.0}) for i in range(6)]
    got = shown(simple(*weak, (".", {}), *strong), {1: 1.0}, {1: 1})
    by = spans(got)
    assert by["w0"][0].split()[:3] == ["c1", "i4", "j0"]
    assert by["s0"][0].split()[:3] == ["c1", "i4", "j4"]
    assert [name for name, (_, number, _) in by.items() if number] == ["w0", "s0"]


def test_sentences_end_with_stops_and_lines_once_they_have_a_few_tokens():
    pieces = ["A", ".", " one", " two", " three", ".", " B", "?", " x", " y", " z", "\n", " last"]
    assert sentences(pieces) == [0] * 6 + [1] * 6 + [2]


def test_the_own_influence_of_a_token_is_told():
    found = TokenText(("a",), ((Firing(1, 2.0, -0.25),),), 0, 1)
    assert spans(shown(found, {1: 1.0}, {}))["a"] == ("c0 i4 j4 k1d", None, "1,2,2,-0.25")


def test_colours_go_to_those_that_dominate_most():
    found = [(text(60, i), dict.fromkeys(range(40), 1.0)) for i in range(3)]
    colours = palette(found)
    assert sorted(colours.values()) == list(range(1, COLOURS + 1))
    assert palette([(simple(("a", {7: 1.0}), ("b", {7: 1.0}), ("c", {8: 1.0})), {7: 1.0, 8: 1.5})]) == {7: 1, 8: 2}
    assert palette([(simple(("a", {7: 1.0})), {})]) == {}


def test_parts_of_a_conversation_and_what_is_left_out():
    found = simple(*[(f"{i} ", {1: 1.0}) for i in range(MAX_TOKENS + 30)])
    got = shown(replace(found, start=3, stop=9, left_out=11), {1: 1.0}, {})
    assert [s.kind for s in got.segments] == ["prompt", "response", "after"]
    assert bare(got.segments[1].html) == "3 4 5 6 7 8 "
    assert (got.tokens, got.left_out) == (MAX_TOKENS + 41, 41)
    assert got.counts == {1: MAX_TOKENS}
    crowded = shown(simple(("a", {k: 1.0 + k for k in range(20)})), dict.fromkeys(range(20), 1.0), {})
    assert len(spans(crowded)["a"][2].split(";")) == MAX_FIRING


def test_foreign_text_is_escaped_and_hidden_characters_are_bounded():
    got = shown(simple((HOSTILE, {1: 1.0}), ("&", {})), {1: 1.0}, {1: 1})
    assert "<script" not in got.segments[0].html
    assert "\u202e" not in got.segments[0].html
    many = shown(simple(*[("\u200b", {1: 1.0})] * 1000), {1: 1.0}, {1: 1})
    assert many.plain
    assert len(many.segments[0].html) < 50_000
    assert "<img" not in context(((HOSTILE, 1.0), ("\u200b" * 400, 0.0)), 3)


def test_a_context_is_as_deep_as_its_activation():
    got = context((("a", 0.0), ("b", 4.0), ("c", 1.0)), 17)
    assert [(names.split()[0], names.split()[-1]) for names, *_ in SPAN.findall(got)] == [
        ("a4", "k17d"),
        ("a1", "k17a"),
    ]


def test_only_the_pages_own_script_may_run(page):
    hostile = build(trace(hostile=True, curves=False))
    for found in (page, hostile):
        scripts = re.findall(r"<script([^>]*)>(.*?)</script>", found, re.S)
        assert [attributes for attributes, _ in scripts] == [""]
        digest = base64.b64encode(hashlib.sha256(scripts[0][1].encode()).digest()).decode()
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', found)[1]
        assert f"script-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'")
        assert "unsafe-inline" not in policy.split("script-src")[1]
        attributes = Attributes()
        attributes.feed(found)
        assert not [name for name in attributes.names if name.startswith("on")]
    assert "<img" not in hostile
    assert "\u202e" not in hostile


def test_the_page_holds_what_was_measured(page):
    said = " ".join(bare(page.split("</style>")[1]).split())
    for words in (
        "SmolLM2-135M", "31.0%", "[27.0%, 35.0%]", "2 missing", "right answer: B. night", "320 candidate rows",
        "fine-tuned: B. night ✓ right", "+4.00", "astronomy", "Rows that hurt it most", "stable rank", "25.02",
        "fires on 1.0% of tokens", "A made-up trace.", "conjugate gradient", "Influence is of first order", "58",
        "Faithfulness was measured on 24 test items",
        "costs the right answer more than removing those of: influence, paper's sign; activation magnitude",
    ):  # fmt: skip
        assert words in said, words


def test_a_page_of_little():
    bare_data = TraceData("t", "now", 3, ())
    assert "There are no test items." in build(bare_data)
    assert "Faithfulness was not measured" in build(bare_data)
    data = trace(items=1, rows=0)
    lonely = replace(data, items=(replace(data.items[0], rows=(), against=(), answers=(), question="", right=None),))
    page = build(replace(lonely, latents=(), faithfulness=None, orthogonality=(), accuracy=()))
    assert "No candidate rows." in page
    assert "the pre-filter left them no candidate" in page
    assert 'href="#faithfulness"' not in page


def test_a_page_of_many_rows_is_bounded(monkeypatch):
    monkeypatch.setattr("curate.reports.trace_view.MAX_TOKENS", 500)
    data = trace(items=2, rows=6, tokens=60, curves=False)
    page = build(data)
    for part in page.split('<details class="rest lazy item"')[1:]:
        assert part.count('<details class="rest lazy row"') == 4 + 1  # 250 tokens of an item; and the one against
        assert "2 more rows are in the data" in part
    monkeypatch.setattr("curate.reports.trace_view.MAX_TOKENS", 2)
    assert build(data).count('<details class="rest lazy row"') == 2 * 2
    monkeypatch.undo()
    many = build(replace(data, items=tuple(replace(data.items[0], id=str(i), rows=()) for i in range(70))))
    assert "10 more test items are in the data" in many


def test_folded_texts_say_how_many_tokens_a_latent_would_light(page):
    counts = re.findall(r'data-counts="([^"]*)"', page)
    assert len(counts) == 3 * (1 + 5)
    item, *rows = ({k: int(n) for k, n in (pair.split(":") for pair in c.split())} for c in counts[:6])
    first = page.split('<details class="rest lazy item"')[1]
    for latent in ("12", "21"):
        spans_of = re.findall(rf'class="t [^"]*k{latent}[abcd][ "]', first)
        assert item[latent] == len(spans_of)
        assert sum(row.get(latent, 0) for row in rows) <= item[latent]


def test_verdicts_follow_the_interval():
    def contrast(low: float | None, high: float | None, value: float, better: int) -> str:
        return verdict(Contrast("a", "b", "necessity", "flip", better, Estimate(value, low, high)))

    assert contrast(-2, -1, -1.5, -1) == "better"
    assert contrast(-2, -1, -1.5, 1) == "worse"
    assert contrast(-1, 1, 0.1, 1) == "unclear"
    assert contrast(None, None, 0.1, 1) == "single"


def test_what_cannot_be_told_is_said_to_be_so():
    flat = masked(better=0.0)
    page = build(replace(trace(items=1, rows=1), faithfulness=flat))
    assert "cannot be told from" in page.split("</header>")[0]
    assert faithfulness(flat)["lead"]["necessity"]["better"] == []


def test_one_item_has_no_interval():
    found = faithfulness(masked(items=1))
    assert len(found["lead"]["necessity"]["single"]) == 5
    assert {c["interval"] for row in found["contrasts"] for c in row["cells"]} == {""}
    assert {c["verdict"] for row in found["contrasts"] for c in row["cells"]} == {"single"}


def test_write_is_whole_or_an_error_and_always_the_same(tmp_path, page):
    url = str(tmp_path / "trace.html")
    write(url, trace())
    assert read_text(url) == page
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write(str(tmp_path / "file" / "trace.html"), TraceData("t", "now", 3, ()))
