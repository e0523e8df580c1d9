"""Example: one conversation of a corpus, whatever columns its source uses.

In: a row as a dict and a ColumnMap. Out: a frozen Example, or BadRow with the reason.
Knows nothing of files, tokenizers or models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from curate.corpus.multiple_choice import INSTRUCTION, AnswerForm, Question, make_question
from curate.errors import BadRow, ConfigError, CorpusError, near

Layout = Literal["auto", "messages", "prompt_response", "alpaca", "multiple_choice"]
ROLES = ("system", "user", "assistant", "tool")
# Names that other formats use for the same roles (ShareGPT and friends).
ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What is to be answered. The `id` seeds the sampling: prompts of one text and two ids get two answers."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One row: `messages` end with the assistant turn that is scored. `row` counts from 0 within its source file."""

    id: str
    row: int
    messages: tuple[Message, ...]
    label: str | None = None
    group: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """Text of the last assistant turn."""
        return self.messages[-1].content


@dataclass(frozen=True)
class ColumnMap:
    """Which columns of the source make an Example. `layout=auto` decides by the columns that are there.

    Of multiple choice: `answer_form` is what the response says of the right option, `choice_instruction` stands below
    the options, and `choice_seed` shuffles them, question by question.
    """

    layout: Layout = "auto"
    messages: str = "messages"
    role_key: str = "role"
    content_key: str = "content"
    prompt: str = "prompt"
    response: str = "response"
    system: str | None = None
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    answer_form: AnswerForm = "letter_and_text"
    choice_instruction: str = INSTRUCTION
    choice_seed: int | None = None
    id: str | None = None
    label: str | None = None
    group: str | None = None

    def required(self, layout: Layout) -> tuple[str, ...]:
        """Columns without which no row of `layout` can be read."""
        needed = {
            "messages": (self.messages,),
            "prompt_response": (self.prompt, self.response),
            "alpaca": (self.instruction, self.output),
            "multiple_choice": (self.question, self.choices, self.answer),
        }[layout]
        extra = tuple(c for c in (self.system, self.id, self.label, self.group) if c)
        return needed + extra

    def optional(self) -> tuple[str, ...]:
        """Columns used when present: Alpaca's `input`, and an `id` column nobody had to name."""
        return (self.input, "id") if self.id is None else (self.input,)

    def resolve(self, columns: Sequence[str], where: str = "the corpus") -> ColumnMap:
        """The same map with `layout` decided and every named column checked against `columns`.

        Raises:
            CorpusError: a named column is not there, or no layout fits; the message lists near names.
        """
        have = set(columns)
        layout: Layout = self.layout
        if layout == "auto":
            fits = [
                name
                for name, n in (("messages", 1), ("prompt_response", 2), ("alpaca", 2), ("multiple_choice", 3))
                if all(c in have for c in self.required(name)[:n])  # type: ignore[arg-type]
            ]
            if not fits:
                raise CorpusError(
                    f"{where} has the columns {sorted(have)!r}, which fit no known layout: expected "
                    f"{self.messages!r}, or {self.prompt!r} and {self.response!r}, or {self.instruction!r} and "
                    f"{self.output!r}, or {self.question!r}, {self.choices!r} and {self.answer!r}. Name your columns, "
                    f"for example source.columns.prompt=question source.columns.response=answer."
                )
            layout = fits[0]  # type: ignore[assignment]
        for column in self.required(layout):
            if column not in have:
                raise CorpusError(
                    f"{where} has no column {column!r}{near(column, have)} "
                    f"(set under source.columns; layout {layout!r})"
                )
        return ColumnMap(**{**self.__dict__, "layout": layout})

    def facts(self) -> dict[str, Any]:
        """As JSON values, for recipes: what is for multiple choice alone only where it is used, or was set."""
        own = ("question", "choices", "answer", "answer_form", "choice_instruction", "choice_seed")
        unused = () if self.layout == "multiple_choice" else own
        return {k: v for k, v in asdict(self).items() if k not in unused or v != getattr(ColumnMap, k)}

    def used(self) -> tuple[str, ...]:
        """All columns a reader must deliver, required and optional, for a resolved map."""
        if self.layout == "auto":
            raise ConfigError("the column layout is not resolved yet; call resolve() with the source's columns")
        return tuple(dict.fromkeys(self.required(self.layout) + self.optional()))


def content_id(messages: Iterable[Message]) -> str:
    """128-bit hash of the conversation: the same text has the same id in every corpus and on every machine."""
    payload = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(payload.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _text(value: Any, what: str) -> str:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"{what} holds text that is not valid Unicode") from None
        return value
    if isinstance(value, list):  # OpenAI content parts
        parts = [p.get("text") for p in value if isinstance(p, Mapping) and p.get("type") == "text"]
        if len(parts) == len(value) and all(isinstance(p, str) for p in parts):
            return "".join(parts)  # type: ignore[arg-type]
        raise BadRow(f"{what} has parts that are not text")
    if value is None:
        raise BadRow(f"{what} has no text")
    raise BadRow(f"{what} is {type(value).__name__}, not text")


def _messages(record: Mapping[str, Any], row: int, columns: ColumnMap) -> list[Message]:
    if columns.layout == "messages":
        turns = record.get(columns.messages)
        if turns is None:
            raise BadRow(f"{columns.messages!r} is missing")
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise BadRow(f"{columns.messages!r} is {type(turns).__name__}, not a list of messages")
        out = []
        for i, turn in enumerate(turns):
            if not isinstance(turn, Mapping):
                raise BadRow(f"message {i} is {type(turn).__name__}, not an object")
            role = turn.get(columns.role_key)
            role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
            if role not in ROLES:
                raise BadRow(f"message {i} has the role {role!r}, not one of {', '.join(ROLES)}")
            out.append(Message(role, _text(turn.get(columns.content_key), f"message {i}")))
        return out
    if columns.layout == "prompt_response":
        system = record.get(columns.system) if columns.system else None
        out = [Message("system", _text(system, columns.system or ""))] if system else []
        out.append(Message("user", _text(record.get(columns.prompt), repr(columns.prompt))))
        out.append(Message("assistant", _text(record.get(columns.response), repr(columns.response))))
        return out
    if columns.layout == "multiple_choice":
        question = to_question(record, row, columns)
        system = record.get(columns.system) if columns.system else None
        out = [Message("system", _text(system, columns.system or ""))] if system else []
        out.append(Message("user", question.listed(columns.choice_instruction)))
        return [*out, Message("assistant", question.answer(columns.answer_form))]
    instruction = _text(record.get(columns.instruction), repr(columns.instruction))
    extra = record.get(columns.input)
    if extra:
        instruction = f"{instruction}\n\n{_text(extra, repr(columns.input))}"
    return [Message("user", instruction), Message("assistant", _text(record.get(columns.output), repr(columns.output)))]


def to_example(record: Mapping[str, Any], row: int, columns: ColumnMap) -> Example:
    """Read one row. Turns after the last assistant turn are dropped: nothing there is trained on.

    Raises:
        BadRow: no assistant turn, an empty response, or a value of the wrong type.
    """
    turns = _messages(record, row, columns)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise BadRow("no assistant turn")
    if not turns[-1].content.strip():
        raise BadRow("the last assistant turn is empty")
    if len(turns) == 1:
        raise BadRow("no turn before the response")
    name = _name(record, columns.id or "id")
    return Example(
        id=name if name else content_id(turns),
        row=row,
        messages=tuple(turns),
        label=_name(record, columns.label),
        group=_name(record, columns.group),
    )


def to_question(record: Mapping[str, Any], row: int, columns: ColumnMap) -> Question:
    """The multiple-choice question of one row; without an id it is named by its row.

    Raises:
        BadRow: no question, choices that are none, or an answer that names no single one.
    """
    text = _text(record.get(columns.question), repr(columns.question))
    if not text.strip():
        raise BadRow(f"{columns.question!r} is an empty text")
    name = _name(record, columns.id or "id") or str(row)
    values, names = (record.get(columns.choices), record.get(columns.answer)), (columns.choices, columns.answer)
    return make_question(name, text, *values, columns.choice_seed, names)


def _name(record: Mapping[str, Any], column: str | None) -> str | None:
    """The value of an id, label or group column as text; None where there is none."""
    value = record.get(column) if column else None
    return None if value is None else _text(str(value), repr(column))
