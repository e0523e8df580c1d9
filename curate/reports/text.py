"""Strings for the page: foreign text made safe and visible, numbers made readable.

In: any Python string, from any corpus, lone surrogates included. Out: escaped HTML or plain text that encodes as
UTF-8, shows every character that would otherwise hide or reorder its neighbours, and is never longer than asked.
Knows nothing of what the text means.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby

from markupsafe import Markup, escape

_JOINERS = "\u200c\u200d"
# Blank on the page although Unicode calls them letters or symbols.
_BLANK = {"\u115f", "\u1160", "\u3164", "\uffa0", "\u2800", "\u180e"}
_NAMES = {
    "\x00": "NULL",
    "\x07": "BELL",
    "\x08": "BACKSPACE",
    "\x0d": "CARRIAGE RETURN",
    "\x1b": "ESCAPE",
    "\x7f": "DELETE",
}
_EMOJI_EXTRAS = {"\ufe0f", *map(chr, range(0x1F3FB, 0x1F400))}
# Scripts in which joiners change letters' shapes; elsewhere a joiner only hides.
_JOINING: tuple[str, ...] = (
    "ARABIC",
    "SYRIAC",
    "MONGOLIAN",
    "DEVANAGARI",
    "BENGALI",
    "GURMUKHI",
    "GUJARATI",
    "ORIYA",
    "TAMIL",
)
_JOINING += ("TELUGU", "KANNADA", "MALAYALAM", "SINHALA", "MYANMAR", "KHMER", "NKO")
MAX_COMBINING = 4  # accents on one letter
MAX_RUN = 4  # marks side by side
MAX_MARKS = 300


def _tokens(text: str) -> Iterator[tuple[str, bool, int]]:
    """(character, whether it must be marked, how often it stands there in a row)."""
    text = text.replace("\r\n", "\n")
    combining, i = 0, 0
    while i < len(text):
        ch = text[i]
        category = unicodedata.category(ch)
        combining = combining + 1 if category in ("Mn", "Me") else 0
        if combining > MAX_COMBINING or _hidden(text, i, ch, category):
            j = i + 1
            while j < len(text) and text[j] == ch:
                j += 1
            yield ch, True, j - i
            i = j
        else:
            yield ch, False, 1
            i += 1


def _hidden(text: str, i: int, ch: str, category: str) -> bool:
    if ch in "\n\t":
        return False
    if ch in _JOINERS:
        return not _joins(text, i)
    if "\U000e0100" <= ch <= "\U000e01ef":  # variation selectors: meant to follow an ideograph, able to carry data
        return i == 0 or not unicodedata.name(text[i - 1], "").startswith("CJK")
    if "\ufe00" <= ch <= "\ufe0f":
        return i == 0 or text[i - 1].isspace() or "\ufe00" <= text[i - 1] <= "\ufe0f"
    return category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or ch in _BLANK


def _joins(text: str, i: int) -> bool:
    """Whether the joiner at i does its ordinary work: inside an emoji, or between letters of a joining script."""
    before = i - 1
    while before >= 0 and text[before] in _EMOJI_EXTRAS:
        before -= 1
    if before < 0 or i + 1 >= len(text):
        return False
    a, b = text[before], text[i + 1]
    if unicodedata.category(a) == "So" and (unicodedata.category(b) == "So" or b in _EMOJI_EXTRAS):
        return True
    return unicodedata.name(a, "").startswith(_JOINING) and unicodedata.name(b, "").startswith(_JOINING)


def count_hidden(text: str) -> int:
    """How many characters of `text` `visible` would mark."""
    return sum(times for _, hidden, times in _tokens(text) if hidden)


def visible(text: object) -> Markup:
    """`text` as HTML: escaped, with hidden characters as marked codes, e.g. U+202E for the right-to-left override.

    Of many hidden characters side by side the first few are marked and the others counted, so too those after
    MAX_MARKS marks. A run of tag characters, which can spell a hidden message, is shown as what it spells.
    """
    out: list[str] = []
    marks = 0
    for hidden, run in groupby(_tokens(str(text)), key=lambda token: token[1]):
        tokens = [(ch, times) for ch, _, times in run]
        if not hidden:
            out.append(str(escape("".join(ch for ch, _ in tokens))))
            continue
        spelt = "".join(chr(ord(ch) - 0xE0000) * times for ch, times in tokens if "\U000e0020" <= ch <= "\U000e007e")
        shown = tokens[: max(0, min(MAX_RUN, MAX_MARKS - marks))]
        marks += len(shown)
        out.extend(_mark(ch, times) for ch, times in shown)
        left_out = sum(times for _, times in tokens[len(shown) :])
        if left_out:
            out.append(f'<b class="mark">+{left_out:,} hidden</b>')
        if len(spelt) > 1:
            out.append(f'<b class="mark" title="spelt in invisible tag characters">spells: {escape(spelt)}</b>')
    return Markup("".join(out))


def _mark(ch: str, times: int) -> str:
    name = unicodedata.name(ch, "") or _NAMES.get(ch) or "control or unassigned character"
    again = f"×{times:,}" if times > 1 else ""
    end = "\n" if ch in "\u2028\u2029" else ""
    return f'<b class="mark" title="{escape(name)}">U+{ord(ch):04X}{again}</b>{end}'


def breakable(text: object) -> Markup:
    """A dotted name as HTML that may break after its dots and underscores."""
    return Markup(re.sub(r"([._])(?=\w)", r"\1<wbr>", str(visible(text))))


def plain(text: object) -> str:
    """`text` for places that take no markup (title, attributes): hidden characters as ⟨U+202E⟩."""
    marked = (f"⟨U+{ord(ch):04X}⟩" if hidden else ch for ch, hidden, _ in _tokens(str(text)))
    return "".join(marked)


def short(text: object, limit: int = 120) -> str:
    """`text` cut to `limit` characters: a label may turn out to be a whole essay."""
    whole_text = str(text)
    return whole_text if len(whole_text) <= limit else whole_text[: limit - 1] + "…"


def fold(text: str, shown: int, limit: int) -> tuple[str, str, int]:
    """(beginning, rest, characters left out): the beginning ends at a space near `shown`, both together at `limit`.

    A text that is only a little longer than `shown` is not folded: a fold costs a click.
    """
    kept = text[:limit]
    if len(kept) <= shown * 1.3:
        return kept, "", len(text) - len(kept)
    cut = max(kept.rfind(" ", int(shown * 0.8), shown), kept.rfind("\n", int(shown * 0.8), shown)) + 1
    cut = cut or shown
    return kept[:cut], kept[cut:], len(text) - len(kept)


def whole(value: float | None) -> str:
    """A whole number with separators; an en dash when there is none."""
    return "–" if value is None else f"{int(value):,}"


def percent(share: float | None) -> str:
    """A share of 1 as per cent, with the digits that matter: 0.25 -> 25.0%, 0.00012 -> 0.012%."""
    if share is None or not math.isfinite(share):
        return "–"
    value = 100 * share
    digits = 1 if value == 0 or abs(value) >= 1 else min(4, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}%".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """A score to `digits` significant digits, without an exponent where that is readable."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}".replace("-", "−")
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}".replace("-", "−")


def alike(values: Sequence[float | None], digits: int = 3) -> list[str]:
    """Numbers that are compared with each other: as many decimals for all as the largest needs for `digits`."""
    known = [abs(v) for v in values if v is not None and math.isfinite(v)]
    largest = max(known, default=0.0)
    if largest == 0 or largest < 1e-4 or largest >= 10**digits:
        return [number(v, digits) for v in values]
    decimals = max(0, digits - 1 - math.floor(math.log10(largest)))
    return [fixed(v, decimals) for v in values]


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals."""
    if value is None or not math.isfinite(value):
        return "–"
    shown = f"{value:.{digits}f}"
    return shown.lstrip("-") if float(shown) == 0 else shown.replace("-", "−")


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
