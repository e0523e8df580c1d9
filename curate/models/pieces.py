"""Pieces: the text that each token of a sequence adds, so that the pieces join to the decoded text.

In: token ids. Out: strings. A character that is spread over several tokens belongs to the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """One string a token. Decodes a few tokens at a time, each with those before it that it depends on (a space that
    only stands between words, a character that is not finished)."""

    def text(a: int, b: int) -> str:
        return str(tokenizer.decode(list(ids[a:b]), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces: list[str] = []
    start = read = 0
    for k in range(1, len(ids) + 1):
        whole = text(start, k)
        if whole.endswith(_UNFINISHED) and k < len(ids):
            pieces.append("")
            continue
        pieces.append(whole[len(text(start, read)) :])
        start, read = read, k
    return pieces
