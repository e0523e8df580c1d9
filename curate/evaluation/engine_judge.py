"""A judge that is a model of one's own: a chat model in an engine of this process (vLLM or transformers).

In: pairs and a template. Out: JudgeScores by the weighted formula of `curate.evaluation.judge`, from the likeliest 20
first tokens of the answer. Knows no cluster and no cache. The template, filled, is a user turn in the model's own chat
template; a blank first token ("\\n", " ") is stepped over, as an endpoint's judge does.

Tokenizers that split numbers into digits (Qwen, Gemma, SmolLM2) have no token "85". There the engine is asked again
behind each digit that matters, so that the formula runs over whole numbers all the same:
p("85") = p(8)·p(5 | 8)·p(no further digit | 85). An endpoint cannot be asked that way, and gives the written number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from curate.corpus.example import Message
from curate.corpus.render import Renderer
from curate.errors import BadRow
from curate.evaluation.judge import JudgeScore, fill, parse_number, score_of
from curate.models.engines import Engine

BLANKS = 2  # blank tokens that are stepped over
LEAST = 0.01  # beginnings of numbers that are less likely are not followed, but taken as the numbers that they are


@dataclass
class _Asked:
    """One pair on its way: `ids` what the engine is asked, `candidates` what it said, or `error` why it did not."""

    ids: list[int]
    error: str | None = None
    candidates: tuple[tuple[int, str, float], ...] = ()
    numbers: list[tuple[str, float]] = field(default_factory=list)


class EngineJudge:
    """See the module's docstring. `renderer` is that of the judge's own tokenizer; its limit is in the judge's tokens.

    `top`: candidates read at each token.
    """

    def __init__(self, engine: Engine, renderer: Renderer, top: int = 20) -> None:
        self.engine, self.renderer, self.top = engine, renderer, top
        self.by_digits = splits_numbers(renderer)

    def __call__(self, pairs: Sequence[tuple[str, str]], prompt_template: str) -> list[JudgeScore]:
        """One JudgeScore a pair, in order; a pair that cannot be rendered, or is over-long, has none and the reason.

        Raises:
            EngineDead: the engine has failed.
        """
        asked = [self._render(fill(prompt_template, q, a)) for q, a in pairs]
        todo = [a for a in asked if a.error is None]
        self._ask(todo)
        for _ in range(BLANKS):
            todo = [a for a in todo if a.candidates and not a.candidates[0][1].strip()]
            for a in todo:
                a.ids = [*a.ids, a.candidates[0][0]]
            self._ask(todo)
        if self.by_digits:
            self._follow_digits([a for a in asked if a.error is None])
        return [self._read(a) for a in asked]

    def _render(self, prompt: str) -> _Asked:
        try:
            return _Asked(self.renderer.messages_ids((Message("user", prompt),)))
        except BadRow as bad:
            return _Asked([], error=bad.reason)

    def _ask(self, asked: Sequence[_Asked]) -> None:
        for a, first in zip(asked, self.engine.first_token([a.ids for a in asked], self.top), strict=True):
            a.candidates, a.error = first.candidates, first.error

    def _follow_digits(self, asked: Sequence[_Asked]) -> None:
        """Fill `numbers` with (number as written, probability): one to three digits, ended by anything else."""
        # (pair, digits so far, ids behind the prompt, probability)
        open_: list[tuple[_Asked, str, list[int], float]] = []
        for a in asked:
            for token, text, p in a.candidates:
                if is_digit(text):
                    open_.append((a, text.strip(), [token], p))
                else:
                    a.numbers.append((text, p))
        while open_:
            followed = [o for o in open_ if o[3] >= LEAST]
            for a, digits, _, p in (o for o in open_ if o[3] < LEAST):
                a.numbers.append((digits, p))
            open_ = []
            answers = self.engine.first_token([[*a.ids, *ids] for a, _, ids, _ in followed], self.top)
            for (a, digits, ids, p), answer in zip(followed, answers, strict=True):
                ended = 1.0
                for token, text, q in answer.candidates:
                    if text == text.strip() and is_digit(text):
                        ended -= q
                        if parse_number(digits + text) is not None:
                            open_.append((a, digits + text, [*ids, token], p * q))
                a.numbers.append((digits, p * max(ended, 0.0)))

    def _read(self, a: _Asked) -> JudgeScore:
        if a.error is not None:
            return JudgeScore(None, reason=a.error)
        candidates = [(text, p) for _, text, p in a.candidates]
        return score_of(a.numbers if self.by_digits else candidates, candidates[0][0])


def is_digit(text: str) -> bool:
    """Whether a token is one ASCII digit, blanks around it allowed."""
    return text.strip() in set("0123456789")


def splits_numbers(renderer: Renderer) -> bool:
    """Whether the tokenizer writes 85 as two tokens. Its last token tells: some put a blank before the first."""
    tokenizer = renderer.tokenizer
    ids = tokenizer("85", add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode([ids[-1]])).strip() == "5"
