"""Final number: which number an answer to a sum ends on.

In: a text. Out: the number as an exact Decimal, or None. Deterministic; knows no question.

1. The number after the last "####" (the mark of GSM8K), where one stands there.
2. Else the number in the last \\boxed{…}.
3. Else the number of the last "answer is …", "answer: …" or "answer = …", of the same line.
4. Else the last number of the text; None where there is none.

Where several numbers stand after such a mark, the one after the last "=" counts, else the first ("#### 3 * 4 = 12" is
12, "the answer is 5 of 20" is 5). Numbers may have a sign, thousands separators, a decimal part and a currency sign:
"$1,234.50", "-7", "18.". A minus counts as a sign only where no digit, letter or bracket stands before it ("5-3" ends
on 3). A percent sign is dropped (45 % = 45), and so are GSM8K's calculator notes <<48/8=6>>. A fraction such as 3/4 is
read as its value.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\].])[-−]\s?)?[$€£]?\s?(?P<minus>(?<=[$€£])-)?(?<![\w.])(?P<top>{_PLAIN})"
    rf"(?:/(?P<bottom>{_PLAIN})(?![\d/]))?",
    re.ASCII,
)
_NOTE = re.compile(r"<<[^<>]*>>")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_SAID = re.compile(r"\banswer\s*(?:(?:is|was|:|=)\s*)+", re.I)


def final_number(text: str) -> Decimal | None:
    """The number that `text` ends on, see the module's docstring for which one that is."""
    text = _NOTE.sub("", text)
    marked = [text.rpartition("####")[2].strip()] if "####" in text else []
    marked += [m[1] for m in reversed(list(_BOXED.finditer(text)))]
    marked += [text[m.end() :] for m in reversed(list(_SAID.finditer(text)))]
    for said in marked:
        found = _of_statement(said.split("\n", 1)[0])
        if found is not None:
            return found
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _of_statement(text: str) -> Decimal | None:
    """The number after the last "=", else the first one."""
    numbers = _numbers(text.rpartition("=")[2]) or _numbers(text)
    return numbers[0] if numbers else None


def _numbers(text: str) -> list[Decimal]:
    return [n for n in map(_value, _NUMBER.finditer(text)) if n is not None]


def _value(match: re.Match[str]) -> Decimal | None:
    try:
        value = Decimal(match["top"].replace(",", ""))
        if match["bottom"]:
            value /= Decimal(match["bottom"].replace(",", ""))
    except (InvalidOperation, ZeroDivisionError):
        return None  # 3/0: a division that was written, not a number
    return -value if match["sign"] or match["minus"] else value
