"""Foreign text on the page: nothing runs, nothing hides, nothing reorders its neighbours."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.reports import text


class Reader(HTMLParser):
    """Text outside marks, and the elements met."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.marks: list[str] = []
        self.outside = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        if tag == "b":
            assert dict(attrs)["class"] == "mark"
            self.marks.append("")

    def handle_endtag(self, tag):
        self.elements.append("/" + tag)

    def handle_data(self, data):
        if self.elements and self.elements[-1] == "b":
            self.marks[-1] += data
        else:
            self.outside += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


@pytest.mark.parametrize(
    ("hidden", "mark"),
    [
        ("\u202e", "U+202E"),
        ("\u2066", "U+2066"),
        ("\u200b", "U+200B"),
        ("\ufeff", "U+FEFF"),
        ("\u00ad", "U+00AD"),
        ("\x00", "U+0000"),
        ("\x1b", "U+001B"),
        ("\x7f", "U+007F"),
        ("\x85", "U+0085"),
        ("\r", "U+000D"),
        ("\ud800", "U+D800"),
        ("\ue000", "U+E000"),
        ("\uffff", "U+FFFF"),
        ("\U000e0041", "U+E0041"),
        ("\U000e0101", "U+E0101"),
        ("\u3164", "U+3164"),
        ("\u200d", "U+200D"),
        ("\ufe0f\ufe0f", "U+FE0F"),
    ],
)
def test_a_hidden_character_is_shown_as_its_code(hidden, mark):
    reader = read(text.visible(f"a{hidden}b"))
    assert reader.marks == [mark]
    assert reader.outside.replace("\ufe0f", "") == "ab"


def test_the_mark_names_the_character():
    assert 'title="RIGHT-TO-LEFT OVERRIDE"' in text.visible("\u202e")


def test_a_run_is_one_mark():
    assert read(text.visible("\x00" * 1234)).marks == ["U+0000×1,234"]


def test_line_separators_still_break_the_line():
    assert read(text.visible("a\u2028b")).outside == "a\nb"


@pytest.mark.parametrize(
    "fine",
    [
        "two\nlines\tand a tab",
        "שלום and مرحبا and 你好",
        "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽 ❤\ufe0f",
        "می\u200cخواهم",
        "क\u094d\u200dष",
        "Zu\u0308rich",
        "a\u00a0b",
    ],
)
def test_ordinary_text_is_left_alone(fine):
    assert text.visible(fine) == fine


def test_windows_line_ends_become_line_ends():
    assert text.visible("a\r\nb") == "a\nb"


def test_a_tower_of_accents_is_counted():
    reader = read(text.visible("Z" + "\u0301" * 500))
    assert len(reader.outside) == 1 + text.MAX_COMBINING
    assert reader.marks == ["U+0301×496"]


def test_many_hidden_characters_side_by_side_are_counted():
    page = text.visible("\u200b\u202e" * 50_000)
    assert read(page).marks == ["U+200B", "U+202E", "U+200B", "U+202E", "+99,996 hidden"]


def test_text_riddled_with_hidden_characters_stays_bounded():
    page = text.visible("a\u200b\u202e\u2066" * 10_000)
    reader = read(page)
    assert sum(m.startswith("U+") for m in reader.marks) == text.MAX_MARKS
    assert reader.marks[-1] == "+3 hidden"
    assert reader.outside == "a" * 10_000


def test_a_message_in_tag_characters_is_spelt_out():
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "ignore <b>")
    reader = read(text.visible(f"Hello{hidden}!"))
    assert reader.marks[-1] == "spells: ignore <b>"
    assert reader.outside == "Hello!"


def test_markup_is_escaped():
    hostile = "<script>alert(1)</script> & \"quotes\" 'too' </b>"
    reader = read(text.visible(hostile))
    assert reader.elements == []
    assert reader.outside == hostile


@given(st.text(alphabet=st.characters()))
def test_no_text_hides_or_breaks_the_page(anything):
    html = text.visible(anything)
    html.encode("utf-8")
    reader = read(html)
    assert set(reader.elements) <= {"b", "/b"}
    for ch in reader.outside:
        assert ch in "\n\t\u200c\u200d" or unicodedata.category(ch) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    text.plain(anything).encode("utf-8")


def test_plain_has_no_markup():
    assert text.plain("a\u202eb") == "a⟨U+202E⟩b"


def test_breakable_breaks_after_dots_and_underscores():
    assert text.breakable("vector_filter.x<y.L15") == "vector_<wbr>filter.<wbr>x&lt;y.<wbr>L15"


def test_short_cuts_a_label():
    assert text.short("abc", 3) == "abc"
    assert text.short("abcdef", 3) == "ab…"


def test_fold_loses_nothing_below_the_limit():
    words = "word " * 1000
    head, rest, left_out = text.fold(words, shown=200, limit=10_000)
    assert head + rest == words
    assert left_out == 0
    assert 160 <= len(head) <= 200
    assert head.endswith(" ")


def test_fold_cuts_at_the_limit_and_says_how_much():
    head, rest, left_out = text.fold("x" * 500, shown=100, limit=300)
    assert (len(head), len(rest), left_out) == (100, 200, 200)


def test_a_text_that_nearly_fits_is_not_folded():
    assert text.fold("x" * 120, shown=100, limit=300) == ("x" * 120, "", 0)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (text.whole(1234567), "1,234,567"),
        (text.whole(None), "–"),
        (text.percent(0.25), "25.0%"),
        (text.percent(0), "0.0%"),
        (text.percent(0.00012), "0.012%"),
        (text.percent(float("nan")), "–"),
        (text.number(0.083456), "0.0835"),
        (text.number(-12.3456, 4), "−12.35"),
        (text.number(123456.0), "123,456"),
        (text.number(0.0000123), "1.23e−05"),
        (text.number(0), "0"),
        (text.number(float("nan")), "–"),
        (text.fixed(-0.5), "−0.50"),
        (text.duration(0.42), "0.4 s"),
        (text.duration(59.7), "1 min"),
        (text.duration(200), "3 min 20 s"),
        (text.duration(7500), "2 h 5 min"),
    ],
)
def test_numbers_are_readable(made, wanted):
    assert made == wanted


def test_alike_gives_the_same_decimals():
    assert text.alike([-2.934, 0.0312, 4.18]) == ["−2.93", "0.03", "4.18"]
    assert text.alike([15.0, 59.2, 101.0]) == ["15", "59", "101"]
    assert text.alike([None, 0.0]) == ["–", "0"]
