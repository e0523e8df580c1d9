"""Chat rendering: an Example as token ids by the model's own chat template, and where its response lies in them.

In: an Example and a tokenizer. Out: Rendered, or BadRow. Knows no model.

Which tokens are the response: the conversation is rendered once more with a marker in the place of the last assistant
text; what stands around the marker is the template's own. **A token belongs to the response if it covers at least one
character of it**, so a token that merges the template's last space with the first word counts, and so does one that
merges the last full stop with the template's newline. The end of turn is the template's text after the response, up
to and including its first special token (all of it where there is none): what the model must emit to stop.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, cast

from jinja2 import TemplateError, TemplateSyntaxError

from curate.corpus.example import Example, Message
from curate.errors import BadRow, ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template trims, splits or escapes them.
_MARK = "\ue000curate\ue001"
# Some templates write today's date into the system prompt; scores must not change with the day.
_DATE = datetime(2024, 7, 26)
_FIXED: dict[str, Any] = {"date_string": _DATE.strftime("%d %b %Y"), "strftime_now": _DATE.strftime}


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation. Response text [start, stop); with its end of turn [start, end), for the loss."""

    input_ids: list[int]
    start: int
    stop: int
    end: int


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything that turns messages into ids: vocabulary, merges, special tokens, chat template."""
    if tokenizer.is_fast:
        body = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("truncation", "padding"):  # state of the last call, not of the tokenizer
            body.pop(setting, None)
    else:
        body = tokenizer.get_vocab()
    payload = json.dumps([body, tokenizer.special_tokens_map, tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.blake2b(payload.encode(), digest_size=16).hexdigest()


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt, **_FIXED)
    return cast(str, text)


def _common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    if isinstance(a, str) and isinstance(b, str):
        return len(os.path.commonprefix([a, b]))
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class Renderer:
    """Renders Examples for one tokenizer. `overlong`: quarantine rows above `max_tokens`, or cut their end off.

    Special tokens written out in a row's text become those tokens, as they do when a trainer renders it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        overlong: Literal["quarantine", "truncate"] = "quarantine",
    ) -> None:
        """
        Raises:
            ConfigError: `max_tokens` < 1, or an unknown `overlong`.
            ModelError: the tokenizer has no chat template, or one that is not Jinja.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
        if overlong not in ("quarantine", "truncate"):
            raise ConfigError(f"overlong is {overlong!r}; choose 'quarantine' or 'truncate'")
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template (a base model?). "
                f"Set model.chat_template to a Jinja template or to the path of a file that holds one."
            )
        try:
            _apply(tokenizer, [{"role": "user", "content": "x"}], True)
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja (line {error.lineno}): {error}") from error
        except TemplateError:
            pass  # it may refuse this conversation and take those of the corpus
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.overlong = overlong
        longest = max(len(t) for t in tokenizer.get_vocab())
        # A normaliser may merge characters before tokens are cut (NFC and the like shorten by four at the most).
        plain = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer is None
        self._max_chars = (max_tokens + 1) * longest * (1 if plain else 4)
        special = set(tokenizer.all_special_ids)
        special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._special = frozenset(special)

    def render(self, example: Example) -> Rendered:
        """Ids and response span of the whole conversation.

        Raises:
            BadRow: over-long (or, when truncating, a prompt that leaves no room); the template refuses the
                conversation; the response cannot be found in what the template made, or has no token.
        """
        text = self._text(example.messages)
        first, last = self._span(example, text)
        cut = self._surely_enough(text)
        if cut < len(text):
            if self.overlong == "quarantine":
                raise BadRow(f"over-long: {len(text)} characters, more than {self.max_tokens} tokens (max_tokens)")
            text, last = text[:cut], min(last, cut)
        ids, start, stop = self._tokens(text, first, last)
        end = self._end(ids, stop)
        if len(ids) > self.max_tokens:
            if self.overlong == "quarantine":
                raise BadRow(f"over-long: {len(ids)} tokens, the limit is {self.max_tokens} (max_tokens)")
            if start >= self.max_tokens:
                raise BadRow(f"over-long: the prompt alone has {start} tokens, the limit is {self.max_tokens}")
            ids = ids[: self.max_tokens]
            stop, end = min(stop, len(ids)), min(end, len(ids))
        if stop <= start:
            raise BadRow("the response has no token in the rendered conversation")
        return Rendered(ids, start, stop, end)

    def render_pair(self, example: Example, response: str) -> Rendered:
        """The example's prompt with another response: for the base model's own answer (paper A eq. 13)."""
        if not response.strip():
            raise BadRow("the generated response is empty")
        return self.render(replace(example, messages=(*example.prompt, Message("assistant", response))))

    def prompt_ids(self, example: Example) -> list[int]:
        """Ids of the turns before the response, ready for the model to answer.

        Raises:
            BadRow: more than `max_tokens`, or the template refuses the conversation.
        """
        return self.messages_ids(example.prompt)

    def messages_ids(self, messages: Sequence[Message]) -> list[int]:
        """As `prompt_ids`, for messages that belong to no row."""
        text = self._text(messages, add_generation_prompt=True)
        if self._surely_enough(text) < len(text):
            raise BadRow(f"over-long: a prompt of {len(text)} characters, more than {self.max_tokens} tokens")
        ids = self._encode(text)
        if len(ids) > self.max_tokens:
            raise BadRow(f"over-long: a prompt of {len(ids)} tokens, the limit is {self.max_tokens} (max_tokens)")
        return ids

    def _surely_enough(self, text: str) -> int:
        """How many characters of `text` are sure to fill more than max_tokens tokens: len(text) where none can tell.

        So a row of a hundred thousand tokens is not tokenised whole only to be turned away. Either no token is long
        enough to fit it all, or a beginning alone has twice the limit (twice, as a cut may change the last few).
        """
        probe = 16 * self.max_tokens
        if len(text) > probe and len(self._encode(text[:probe])) > 2 * self.max_tokens:
            return probe
        return min(len(text), self._max_chars)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return _apply(self.tokenizer, turns, add_generation_prompt)
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # a template is a program of its own
            raise BadRow(f"the chat template refuses the conversation: {error}") from error

    def _span(self, example: Example, text: str) -> tuple[int, int]:
        """Characters [first, last) of the response in `text`."""
        marked = self._text((*example.prompt, Message("assistant", _MARK)))
        at = marked.rfind(_MARK)
        if at < 0:
            raise BadRow("the chat template leaves the response out")
        before, after = marked[:at], marked[at + len(_MARK) :]
        if text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text):
            return len(before), len(text) - len(after)
        # The template rewrites around the response by what it says (it moves a <think> part, for one): take what
        # differs from the marked rendering, provided that the difference lies in the last turn.
        first = _common_prefix(text, marked)
        last = len(text) - _common_prefix(text[::-1], marked[::-1])
        prompt = self._text(example.prompt)
        if text.startswith(prompt) and first >= len(prompt) and first < last:
            return first, last
        raise BadRow("the response cannot be found in the rendered conversation")

    def _tokens(self, text: str, first: int, last: int) -> tuple[list[int], int, int]:
        """Ids of `text`, and the tokens [start, stop) that cover characters [first, last)."""
        if not self.tokenizer.is_fast:
            return self._tokens_without_offsets(text, first, last)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(out["input_ids"]), out["offset_mapping"]
        covers = [i for i, (a, b) in enumerate(offsets) if a < b and a < last and b > first]
        return (ids, covers[0], covers[-1] + 1) if covers else (ids, 0, 0)

    def _tokens_without_offsets(self, text: str, first: int, last: int) -> tuple[list[int], int, int]:
        """The same from the outside in: tokens that the text around the response makes alike are not its own."""
        ids = self._encode(text)
        start = _common_prefix(ids, self._encode(text[:first]))
        stop = len(ids) - _common_prefix(ids[::-1], self._encode(text[last:])[::-1])
        return ids, start, max(stop, start)

    def _end(self, ids: list[int], stop: int) -> int:
        for i in range(stop, len(ids)):
            if ids[i] in self._special:
                return i + 1
        return len(ids)
