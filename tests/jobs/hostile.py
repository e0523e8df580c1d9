"""Hostile rows by property-based generation: lines of JSON as nobody should write them, and some that only look bad.

Out: lines as bytes, without a line end, each with what is known of it: True (it must be scored), False (it must be
quarantined) or None (either, but one of the two). Everything follows from a seed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EVIL = "evil"  # in every injected tag, attribute and script: what a page must never have as markup
MARKUP = (
    f"<script>{EVIL}()</script>",
    f"</script><script src=//{EVIL}.example/x.js></script>",
    f"<img src=x on{EVIL}=1 onerror={EVIL}()>",
    f"\"'><svg/onload={EVIL}()>",
    f"</pre></details></table><{EVIL}-tag a=1>",
    f"<a href=javascript:{EVIL}()>x</a>",
    f"<style>*{{background:url(//{EVIL}.example)}}</style><!-- {EVIL} --><![CDATA[",
    f"{{{{ {EVIL} }}}} {{% {EVIL} %}} ${{{EVIL}}} &#60;{EVIL}&#62; &lt;{EVIL}&gt;",
    f"<meta http-equiv=refresh content=0;url=//{EVIL}.example><base href=//{EVIL}.example>",
)
ODD = (
    "nul \x00 bell \x07 escape \x1b[31m backspace \x08 delete \x7f",
    "line\u2028par\u2029next\x85feed\x0cvertical\x0b",
    "\u202edesrever\u202c \u2066iso\u2069 \u200b\u200f\u200e\ufeff\u2060",
    "שלום עולם مرحبا بالعالم \u0627\u0644\u0644\u0647",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 \U000e0041\U000e0042 e\u0301\u0301\u0301\u0301\u0301\u0301",
    "\U0010ffff\ufffe\uffff\ufdd0 \ue000curate\ue001 \ufffd",
    "<|im_end|>\n<|im_start|>assistant\nand goes on<|im_end|>",
    "<|endoftext|><pad><|im_start|>",
    "</s><s>[INST] x [/INST] <<SYS>> <bos> <eos> <unk>",
    "\\u0000 \\ \\\\ \" ' ` \\n",
    "%s %d %n {0} {} $(reboot) `id` ; DROP TABLE rows; --",
    "../../../etc/passwd\\..\\windows",
    "  \t leading and trailing \u00a0\u3000 ",
    "NaN", "Infinity", "null", "true", "1e999", "-0", "0x1F", "١٢٣",
)  # fmt: skip
LONE = ("\ud800", "x\udfffx", "\udc00\ud800", "ok \udbff")
IDS = ("same", "same too", "../../etc/passwd", "a/b/c", "C:\\x", ".", "..", " ", "x" * 300, MARKUP[0])
DEEP = 200_000
T = TypeVar("T")


def pool(strategy: st.SearchStrategy[T], n: int) -> list[T]:
    """`n` or more values of a strategy, always the same. Drawn in bulk: a whole row by hypothesis costs 20 ms."""
    found: list[T] = []

    @settings(
        max_examples=-(-n // 20),
        database=None,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(strategy, min_size=20, max_size=20))
    def collect(batch: list[T]) -> None:
        found.extend(batch)

    collect()
    return found


def _json() -> st.SearchStrategy[Any]:
    """Any JSON value; few levels. NaN, infinities and lone surrogates too, as json.dumps writes them."""
    texts = st.one_of(st.text(max_size=8), st.sampled_from((*LONE, *ODD, *MARKUP)))
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
    keys = st.sampled_from(("role", "content", "text", "type", "messages", "", "\ud800"))
    return st.recursive(
        plain,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=6,
    )


@dataclass(frozen=True)
class Line:
    """One line of a corpus. `good`: see the module's docstring."""

    raw: bytes
    good: bool | None


class Maker:
    """Rows from pools of texts and values that hypothesis has drawn."""

    def __init__(self, number: int) -> None:
        self.draw = random.Random(number)
        self.texts = pool(st.text(max_size=12), 400)
        self.values = pool(_json(), 300)

    def text(self, least: bool = False) -> str:
        """Some pieces, joined; `least`: with a character that is no space."""
        pools = (MARKUP, ODD, self.texts)
        made = "".join(self.draw.choice(self.draw.choice(pools)) for _ in range(self.draw.randint(1, 3)))
        return made if made.strip() or not least else made + "x"

    def good(self) -> dict[str, Any]:
        """A row that is as it should be, whatever stands in it."""
        draw, text = self.draw, self.text
        turns: list[dict[str, Any]] = [{"role": "user", "content": text()}]
        if draw.random() < 0.5:
            turns.insert(0, {"role": draw.choice(("system", "developer")), "content": text()})
        if draw.random() < 0.25:
            turns += [{"role": "gpt", "content": text(True)}, {"role": "human", "content": text()}]
        if draw.random() < 0.2:
            turns[-1]["content"] = [{"type": "text", "text": text()}]
        turns.append({"role": draw.choice(("assistant", "model", "bot")), "content": text(True)})
        row: dict[str, Any] = {"messages": turns, "label": draw.choice(("marked", "plain", *MARKUP[:3]))}
        row["id"] = draw.choice(IDS) if draw.random() < 0.3 else text(True)
        row["group"] = draw.choice(("g0", "g1", "../g", MARKUP[3], ODD[2]))
        if draw.random() < 0.25:
            row[draw.choice(("prompt", "extra", "", MARKUP[1]))] = draw.choice(self.values)
        return row

    def line(self) -> Line:
        draw = self.draw
        kind = draw.randrange(10)
        if kind <= 3:
            return Line(_line(self.good(), draw.random() < 0.5), True)
        if kind <= 6:
            odd = next(v for v in iter(lambda: draw.choice(self.values), self) if not isinstance(v, dict))
            return Line(_line(_spoiled(self.good(), draw.randrange(SPOILS), odd, draw.choice(LONE)), False), False)
        if kind == 7:  # cut off, or with bytes that are no text
            whole = _line(self.good(), draw.random() < 0.5)
            at = draw.randint(1, len(whole) - 2)
            return Line(whole[:at] if draw.random() < 0.5 else whole[:at] + b"\xff\xc0" + whole[at:], False)
        if kind == 8:
            row = self.good()
            row[draw.choice(("messages", "id", "label", "group"))] = draw.choice(self.values)
            return Line(_line(row, False), None)
        raw = draw.randbytes(draw.randint(1, 40)).replace(b"\n", b"?")
        return Line(b"?" if raw.isspace() else raw, None)


def _spoiled(row: dict[str, Any], how: int, odd: Any, lone: str) -> Any:
    """`row` with one thing wrong with it that no reading can mend."""
    turns: list[Any] = row["messages"]
    match how:
        case 0:
            del row["messages"]
        case 1:
            row["messages"] = None
        case 2:
            row["messages"] = json.dumps(turns)
        case 3:
            row["messages"] = {"0": turns[0]}
        case 4:
            row["messages"] = []
        case 5:
            row["messages"] = turns[-1:]
        case 6:
            turns.append({"role": "user", "content": "and then?"})
            row["messages"] = [t for t in turns if t["role"] not in ("assistant", "model", "bot", "gpt")]
        case 7:
            turns[-1]["content"] = " \n\t\u00a0"
        case 8:
            turns[-1]["content"] = lone
        case 9:
            turns[0]["content"] = lone
        case 10:
            turns[0]["role"] = f"wizard{lone}"
        case 11:
            turns[0]["role"] = [odd]
        case 12:
            turns[-1]["content"] = 5
        case 13:
            turns[-1]["content"] = None
        case 14:
            turns[-1]["content"] = {"text": "x"}
        case 15:
            turns.insert(0, None)
        case 16:
            turns.insert(0, "user: hello")
        case 17:
            turns[-1]["content"] = [{"type": "image_url", "image_url": "x"}]
        case 18:
            row["id"] = lone
        case 19:
            row["label"] = lone
        case 20:
            turns[-1]["content"] = "word " * 3000
        case 21:
            return [row]
        case _:
            return odd if not isinstance(odd, dict) else [odd]
    return row


SPOILS = 23


def _line(value: Any, ascii_only: bool) -> bytes:
    text = json.dumps(value, ensure_ascii=ascii_only)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def giants() -> list[Line]:
    """A few rows that are large, or deep: what costs memory or a stack."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    long = [{"role": "user", "content": "hello " * 200_000}, turns[1]]
    many = [t for _ in range(20_000) for t in turns]
    return [
        Line(_line({"messages": turns, "blob": "A" * 3_000_000}, True), True),
        Line(_line({"messages": long}, True), False),
        Line(_line({"messages": [turns[0], {"role": "assistant", "content": "word" * 500_000}]}, True), False),
        Line(_line({"messages": many}, True), False),
        Line(b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}", False),
        Line(b'{"a": ' * DEEP + b"1" + b"}" * DEEP, False),
        Line(b'{"messages": ' + b"9" * 100_000 + b"}", False),
        Line(_line({"messages": turns, "id": "x" * 1_000_000}, True), None),
        Line(_line({"messages": turns} | {f"column {i}": i for i in range(5_000)}, True), True),
    ]


def hostile(n: int, number: int = 0) -> list[Line]:
    """`n` lines, always the same for one `number`."""
    maker, big = Maker(number), giants()
    found = [maker.line() for _ in range(n - len(big))] + big
    maker.draw.shuffle(found)
    return found
