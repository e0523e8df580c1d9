"""Option parser: which option of a multiple-choice question a generated answer chooses.

In: the answer's text and the options' texts (option 0 is letter A). Out: a Choice: the option's index, or None where
the answer chooses none or more than one, and the rule that decided. Deterministic; knows no model, and not which
option is right. The rules, in order; the first that applies decides, also when what it says is "more than one":

 0. What is not the answer is cut off: Markdown marks; what follows a line that begins a new question or turn
    ("Question:", "Q:", "User:", "Human:"); and a repetition of the list of options (lines labelled A, B, …, or two or
    more labels from A on with their own texts), since a model that copies the list has not chosen.
 1. `text`: the answer is the text of an option and nothing else (case, article and punctuation aside),
    where that is not a letter as well.
 2. `declared`: a letter that is said to be the answer: "The answer is (B).", "Answer: b", "I choose B", "so C",
    "B is correct", \\boxed{B}, or a line of its own. After "The answer is" an option's text will do. Two different
    declarations are more than one, unless words of correction stand between ("The answer is A. Wait, no: it is B").
 3. `leading`: the answer begins with a letter: "B", "B) because …", "(b)", "B. uses what it needs", "Option B", "b)".
 4. `marked`: a letter with a bracket or the word option anywhere: "I like (C) best".
 5. `contained`: an option's text within the answer: "I suppose deep sea animals do". A text within a longer option's
    text does not count.
 6. `letter`: a capital letter that stands alone: "I think A is wrong, C might do".

In rules 2 to 6 whatever is denied does not count ("not B", "B is wrong", "unlike (B)", "rather than B"), and letters
that stand together ("Both A and B", "A or B", "A/B") are more than one. The letters are the options' own: with four
options E is no letter. Lower-case letters count only with a bracket, a full stop or colon, after a declaration at the
end of a phrase, or alone, as "a" is an article; so "A dog" is no A, but "A is" and "A because" are. A letter within an
option's text ("vitamin C") is none. A letter and, right after it, the text of another option ("B. fish" where C is
fish) are more than one. Nothing at all ("I don't know", an empty answer) is None by the rule `none`.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Literal

from curate.corpus.multiple_choice import MAX_OPTIONS

Rule = Literal["text", "declared", "leading", "marked", "contained", "letter", "none"]


@dataclass(frozen=True)
class Choice:
    """`index` of the chosen option from 0; None = none or several. `rule`: which rule of the docstring decided."""

    index: int | None
    rule: Rule


@dataclass(frozen=True)
class _Mention:
    """Options named at [start, stop) of the answer: one, or several that stand together."""

    options: frozenset[int]
    start: int
    stop: int
    denied: bool
    declared: bool
    corrects: bool = False
    leading: bool = False
    marked: bool = False


_MARKDOWN = re.compile(r"[*`]+|(?<!\w)_+|_+(?!\w)|^\s*(?:#+|>)\s*", re.M)
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{)?([^{}]*)\}?\s*\}")
_NEXT = re.compile(r"\n\s*(?:question|q|user|human|instruction)\s*\d*\s*[:.]", re.I)
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-"})

_JOIN = r"\s*(?:,|/|&|\+|\band\b|\bor\b|\bnor\b|, and\b|, or\b)\s*(?:also\s+|both\s+|either\s+|option\s+|choice\s+)?"
# What stands before a letter that is declared, up to the letter itself.
_FILLER = (
    r"(?:(?:most\s+|very\s+)?(?:definitely|probably|likely|clearly|therefore|thus|indeed|actually|simply|not)\s+)*"
)
_NOUN = r"(?:(?:the\s+)?(?:letter|option|choice|answer)\s*:?\s*)?"
_IS = r"(?:\s*(?:is|was|are|would\s+be|should\s+be|must\s+be|will\s+be|could\s+be|might\s+be|:|=|->|-)(?=\W|$))+"
_ANSWER = (
    r"\b(?:answer|choice|option|response|solution)s?"
    r"(?:\s+(?:to|for|of|from|among)\s[^.\n:;?!]{1,80}\??|\s+here|\s*\([^()\n]{0,40}\))?" + _IS + r"\s*"
)
_I_SAY = (
    r"\b(?:i(?:\s+would|\s+will|'d|'ll)?(?:\s+have\s+to)?\s+(?:choose|pick|select|say|guess|answer|go\s+with|think|believe)"
    r"|(?:choose|pick|select|go(?:ing)?\s+with)|it\s+(?:is|must\s+be|has\s+to\s+be|should\s+be)|it's|that's"
    r"|so|thus|hence|therefore|then)[\s,:]+(?:it(?:\s+is|'s)\s+|that\s+(?:it\s+is\s+|it's\s+)?|with\s+)?"
)
_BEFORE = re.compile(rf"(?:{_ANSWER}|{_I_SAY}){_FILLER}{_NOUN}[\"'(\[]*$", re.I)
_BEFORE_TEXT = re.compile(rf"{_ANSWER}{_FILLER}[\"']*(?:(?:a|an|the)\s+)?$", re.I)
_NOT_BEFORE = re.compile(
    r"(?:\bnot|\bnever|n't|\bneither|\bnor|\beliminat\w+|\b(?:rule|ruled|ruling)\s+out|\bexclud\w+|\breject\w*|\bexcept"
    r"|\brather\s+than|\binstead\s+of|\bunlike|\bwrong:|\bincorrect:)\s+(?:(?:be|is|the|an?|either|likely|really|just|only"
    r"|option|choice|letter|answer|correct|right|for|because|of)\s+){0,4}[\"'(\[]*$",
    re.I,
)
_VERB = r"(?:is|are|was|were|seems?|looks?|sounds?|would\s+be|must\s+be|should\s+be|has\s+to\s+be|appears?\s+to\s+be)"
_NOT_AFTER = re.compile(
    rf"(?:{_VERB}\s+(?:\w+ly\s+|also\s+|all\s+|both\s+|just\s+)*(?:not|n't|never|wrong|incorrect|false|untrue|impossible"
    r"|irrelevant|unlikely|out\b|implausible|inaccurate)|(?:isn't|aren't|wasn't|can't|cannot|couldn't|doesn't|don't|won't)\b"
    r"|(?:can|could|does|do|will|would|should)\s+not\b)",
    re.I,
)
_AFTER = re.compile(
    rf"{_VERB}\s+(?:\w+ly\s+|also\s+)*(?:the\s+|a\s+|my\s+)?(?:most\s+|only\s+|single\s+)?(?:\w+ly\s+)?"
    r"(?:correct|right|true|best|accurate|appropriate|suitable|likely|answer|choice)\b",
    re.I,
)
_CORRECTS = re.compile(r"\b(?:wait|actually|sorry|correction|on second thought|i mean|rather|mistake|no)\b", re.I)
_LEAD = re.compile(r"\s*(?:(?:the\s+)?(?:option|choice|letter)\s*:?\s*|[-\"'>:.]+\s*)*", re.I)
# Words after which a capital A or I at the start of a sentence is a letter and not an article or a pronoun.
_LETTER_VERB = re.compile(
    r"\s+(?:is|isn't|was|because|since|as|and|or|would|could|must|should|seems|makes|has|cannot|-)\b", re.I
)


def parse_option(answer: str, options: Sequence[str]) -> Choice:
    """The option that `answer` chooses; see the module's docstring for the rules.

    Raises:
        ValueError: no option, or more than 26.
    """
    if not 1 <= len(options) <= MAX_OPTIONS:
        raise ValueError(f"{len(options)} options; expected 1 to {MAX_OPTIONS}")
    texts = [_plain(o) for o in options]
    text = _without_list(_cut(_plain(answer)), texts)
    labels = {"", *ascii_uppercase[: len(texts)].casefold()}
    equal = [i for i, o in enumerate(texts) if _bare(o) == _bare(text) and _bare(o) not in labels]
    if equal:
        return Choice(equal[0] if len(equal) == 1 else None, "text")
    named = [m for m in _text_mentions(text, texts) if not m.denied]
    letters = [m for m in _letter_mentions(text, texts) if not m.denied]
    steps: tuple[tuple[Rule, list[_Mention]], ...] = (
        ("declared", _last_word([m for m in letters if m.declared])),
        ("declared", _last_word([m for m in named if m.declared])),
        ("leading", [m for m in letters if m.leading]),
        ("marked", [m for m in letters if m.marked]),
        ("contained", named),
        ("letter", letters),
    )
    for rule, found in steps:
        if found:
            chosen = frozenset[int]().union(*(m.options for m in found))
            return Choice(next(iter(chosen)) if len(chosen) == 1 else None, rule)
    return Choice(None, "none")


def _last_word(mentions: list[_Mention]) -> list[_Mention]:
    """The mentions from the last correction on: what was said before it is taken back."""
    start = max((i for i, m in enumerate(mentions) if m.corrects), default=0)
    return mentions[start:]


def _plain(text: str) -> str:
    """Without Markdown, typographic quotes, LaTeX boxes and full-width letters."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).replace("\r\n", "\n")
    text = _BOXED.sub(r"answer: \1.", text)
    return _MARKDOWN.sub("", text).strip()


def _bare(text: str) -> str:
    """For comparing: case, articles, punctuation at the ends and blanks aside."""
    text = " ".join(text.casefold().split()).strip(" \t\n.,;:!?\"'()[]")
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", text)


def _cut(text: str) -> str:
    following = _NEXT.search(text)
    return text[: following.start()] if following else text


def _without_list(text: str, texts: Sequence[str]) -> str:
    """The text less a repetition of the options: lines labelled A, B, …, or labels in a row with their own texts."""
    lines = text.split("\n")
    i = 0
    while i < len(lines):
        run, at = 0, i
        while at < len(lines) and run < len(texts):
            if lines[at].strip():
                if not re.match(rf"\s*[-(\[]*{ascii_uppercase[run]}[)\].:]", lines[at]):
                    break
                run += 1
            at += 1
        if run >= 2:
            del lines[i:at]
        else:
            i += 1
    text = "\n".join(lines)
    labelled = [rf"[(\[]?{ascii_uppercase[i]}[)\].:]*\s*[-:]?\s*{re.escape(t)}[\s.,;]*" for i, t in enumerate(texts)]
    if len(texts) > 1:
        rest = ""
        for piece in reversed(labelled[2:]):
            rest = f"(?:{piece}{rest})?"
        text = re.sub(r"(?<!\w)" + labelled[0] + labelled[1] + rest, " ", text, flags=re.I)
    return text.strip()


def _text_spans(text: str, texts: Sequence[str]) -> list[tuple[int, int, frozenset[int]]]:
    """Where options' texts stand as whole words; those within a longer one's place left out. Equal texts share one."""
    found: dict[tuple[int, int], set[int]] = {}
    for i, option in enumerate(texts):
        words = option.rstrip(".!?,;: ")
        if len(words) < 2 and not words.isdigit():
            continue  # a letter, or a sign that stands in many sentences
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words.split())) + r"(?!\w)"
        for m in re.finditer(pattern, text, re.I):
            found.setdefault(m.span(), set()).add(i)
    out: list[tuple[int, int, frozenset[int]]] = []
    for (a, b), who in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1])):
        if not out or b > out[-1][1]:  # else within the one before
            out.append((a, b, frozenset(who)))
    return out


def _text_mentions(text: str, texts: Sequence[str]) -> Iterator[_Mention]:
    end = 0
    for a, b, who in _text_spans(text, texts):
        before = _sentence(text, a)
        declared = bool(_BEFORE_TEXT.search(before) or _AFTER.match(text[b:].lstrip()))
        yield _Mention(who, a, b, _denied(before, text[b:]), declared, bool(_CORRECTS.search(text[end:a])))
        end = b


def _letter_mentions(text: str, texts: Sequence[str]) -> Iterator[_Mention]:
    spans = _text_spans(text, texts)
    at = {a: who for a, _, who in spans}
    last = ascii_uppercase[len(texts) - 1]
    letter = f"[A-{last}a-{last.lower()}]"
    one = rf"(?:[(\[]{letter}[)\]]|(?<![\w'.\-]){letter}(?![\w'])(?!-\w)(?!\.\w)\)?)"
    lead = _LEAD.match(text)
    start = lead.end() if lead else 0
    end = 0
    for m in re.finditer(rf"(?<!\w/){one}(?:{_JOIN}{one})*", text):
        i = bisect_right(spans, m.start(), key=lambda span: span[0]) - 1
        if i >= 0 and m.end() <= spans[i][1]:
            continue
        letters = [x.strip("()[]") for x in re.findall(one, m[0])]
        single = len(letters) == 1
        before, after = _sentence(text, m.start()), text[m.end() :]
        line = text.rfind("\n", 0, m.start()) + 1, (text + "\n").index("\n", m.end())
        alone = not text[line[0] : m.start()].strip(" ([\"'-") and not text[m.end() : line[1]].strip(" .)]:\"'")
        bracket = m[0][0] in "([" or m[0][-1] in ")]"
        label = bracket or bool(re.match(r"[).:\]]", after))
        ends = bool(re.match(r"\s*(?:[.,;:!?)\]\"']|$|\n)", after))
        option = bool(re.search(r"\b(?:option|choice|letter)s?\s*:?\s*$", before, re.I))
        declared = (alone and m.start() != start) or bool(_BEFORE.search(before))
        small = any(x.islower() for x in letters)
        if small and not (bracket or (declared and ends) or alone or (label and m.start() == start) or option):
            continue
        word = single and letters[0] in "AI" and not (label or declared or alone or option or ends)
        if word and not _LETTER_VERB.match(after):
            continue  # an article or a pronoun
        after = re.sub(r"^[)\].:\-\"'\s]+", "", after)
        options = frozenset(ascii_uppercase.index(x.upper()) for x in letters)
        labelled = at.get(len(text) - len(after), frozenset())
        if single and not options & labelled:
            options |= labelled
        elif single and (own := texts[min(options)]) and after[: len(own)].casefold() == own.casefold():
            after = after[len(own) :].lstrip(" )].\"'")
        yield _Mention(
            options,
            m.start(),
            m.end(),
            denied=_denied(before, after),
            declared=declared or bool(_AFTER.match(after)),
            corrects=bool(_CORRECTS.search(text[end : m.start()])),
            leading=m.start() == start,
            marked=bracket or option,
        )
        end = m.end()


def _sentence(text: str, stop: int, width: int = 160) -> str:
    """What stands before `stop` in its sentence. A colon or line break may stand between "Answer:" and the letter."""
    before = text[max(0, stop - width) : stop]
    return re.split(r"(?<=[.!?;])\s", before)[-1]


def _denied(before: str, after: str) -> bool:
    return bool(_NOT_BEFORE.search(before) or _NOT_AFTER.match(after.lstrip(" ,\"')")))
