"""Trait: the text from which a persona vector is made.

In: a JSON or YAML file (or any URL of one). Out: a frozen, checked Trait. Knows no model and no judge.

Keys: `name`, `description`; `instructions` [{positive, negative}]: system instructions that bring the trait out and
keep it away; `extract_questions` and `evaluate_questions` (disjoint, so that a steered or retrained model is not asked
what the vector was made from); `contrastive_responses` [{question, positive, negative}], where `question` is an index
into `extract_questions`, counted from 0, or the question's text; `judge_prompt` and `coherence_prompt`, templates with
{question} and {answer} that ask for an integer 0-100. The files of the persona_vectors repository (`instruction`
[{pos, neg}], `questions`, `eval_prompt`) are read too; the name then comes from the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from connectors import storage
from curate.errors import ConfigError, near

_KEYS = (
    "name",
    "description",
    "instructions",
    "extract_questions",
    "evaluate_questions",
    "contrastive_responses",
    "judge_prompt",
    "coherence_prompt",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Instruction:
    """A pair of system instructions."""

    positive: str
    negative: str


@dataclass(frozen=True)
class Contrast:
    """Two answers to extract question number `question`: one shows the trait, the other does not."""

    question: int
    positive: str
    negative: str


@dataclass(frozen=True)
class Trait:
    """See the module's docstring for the fields. Empty fields are allowed; the method that needs one says so."""

    name: str
    description: str = ""
    instructions: tuple[Instruction, ...] = ()
    extract_questions: tuple[str, ...] = ()
    evaluate_questions: tuple[str, ...] = ()
    contrastive_responses: tuple[Contrast, ...] = ()
    judge_prompt: str = ""
    coherence_prompt: str = ""

    @property
    def digest(self) -> str:
        """Hash of the whole trait, for recipes."""
        payload = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(payload.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def questions(self, which: str) -> tuple[str, ...]:
        """`extract` or `evaluate`.

        Raises:
            ConfigError: another word, or a trait without such questions.
        """
        if which not in ("extract", "evaluate"):
            raise ConfigError(f"unknown set of questions {which!r}{near(which, ('extract', 'evaluate'))}")
        found = self.extract_questions if which == "extract" else self.evaluate_questions
        if not found:
            raise ConfigError(f"trait {self.name!r} has no {which}_questions")
        return found


def load_trait(url: str) -> Trait:
    """Read and check a trait file (.json, .yaml, .yml).

    Raises:
        ConfigError: broken syntax or contents; names the file and the entry. StorageError: not readable.
    """
    text = storage.read_text(url)
    base = url.rsplit("/", 1)[-1]
    stem, _, suffix = base.rpartition(".")
    try:
        if suffix.lower() in ("yaml", "yml"):
            body = yaml.safe_load(text)
        elif suffix.lower() == "json":
            body = json.loads(text)
        else:
            raise ConfigError(f"trait file {url}: unknown suffix {suffix!r}; expected .json, .yaml or .yml")
    except (json.JSONDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"trait file {url} cannot be parsed: {e}") from e
    return parse_trait(body, url, stem)


def parse_trait(body: Any, where: str = "the trait", name: str | None = None) -> Trait:
    """A Trait from parsed JSON or YAML. `name` is used when `body` has none.

    Raises:
        ConfigError: an unknown key, a wrong type, an empty text, a doubled question, or a template without its fields.
    """
    if not isinstance(body, Mapping):
        raise ConfigError(f"{where}: expected an object with the keys {', '.join(_KEYS)}, found {type(body).__name__}")
    if "instruction" in body and "instructions" not in body:
        body = _from_persona_vectors(body, where)
    for key in body:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}{near(str(key), _KEYS)}")
    title = _text(body.get("name", name), "name", where)
    if not _NAME.fullmatch(title):
        raise ConfigError(f"{where}: name {title!r} must be of letters, digits, '-' and '_' (it names a column)")
    extract = _questions(body, "extract_questions", where)
    evaluate = _questions(body, "evaluate_questions", where)
    shared = set(extract) & set(evaluate)
    if shared:
        raise ConfigError(
            f"{where}: {len(shared)} question(s) are both in extract_questions and evaluate_questions, for example "
            f"{sorted(shared)[0][:80]!r}; an evaluation must not ask what the vector was made from"
        )
    instructions = []
    for i, pair in enumerate(_list(body, "instructions", where)):
        at = f"instructions[{i}]"
        fields = _object(pair, ("positive", "negative"), at, where)
        instructions.append(Instruction(*(_text(fields[k], f"{at}.{k}", where) for k in ("positive", "negative"))))
    contrasts = []
    for i, row in enumerate(_list(body, "contrastive_responses", where)):
        at = f"contrastive_responses[{i}]"
        fields = _object(row, ("question", "positive", "negative"), at, where)
        positive, negative = (_text(fields[k], f"{at}.{k}", where) for k in ("positive", "negative"))
        if positive == negative:
            raise ConfigError(f"{where}: {at} has the same text as positive and negative")
        contrasts.append(Contrast(_question_index(fields["question"], extract, at, where), positive, negative))
    return Trait(
        name=title,
        description=str(body.get("description") or ""),
        instructions=tuple(instructions),
        extract_questions=extract,
        evaluate_questions=evaluate,
        contrastive_responses=tuple(contrasts),
        judge_prompt=_template(body, "judge_prompt", where),
        coherence_prompt=_template(body, "coherence_prompt", where),
    )


def _from_persona_vectors(body: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = {"instruction": "instructions", "questions": "extract_questions", "eval_prompt": "judge_prompt"}
    out = {names.get(k, k): v for k, v in body.items()}
    pairs = []
    for i, pair in enumerate(_list(out, "instructions", where)):
        fields = _object(pair, ("pos", "neg"), f"instruction[{i}]", where)
        pairs.append({"positive": fields["pos"], "negative": fields["neg"]})
    return {**out, "instructions": pairs}


def _text(value: Any, at: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "an empty text" if isinstance(value, str) else type(value).__name__
        raise ConfigError(f"{where}: {at} must be a text, found {found}")
    return value


def _list(body: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = body.get(key) or []
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {key} must be a list, found {type(value).__name__}")
    return value


def _object(value: Any, keys: Iterable[str], at: str, where: str) -> Mapping[str, Any]:
    expected = tuple(keys)
    if not isinstance(value, Mapping) or set(value) != set(expected):
        found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise ConfigError(f"{where}: {at} must be an object with the keys {', '.join(expected)}, found {found}")
    return value


def _questions(body: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    out = [_text(q, f"{key}[{i}]", where) for i, q in enumerate(_list(body, key, where))]
    if len(set(out)) != len(out):
        twice = next(q for q in out if out.count(q) > 1)
        raise ConfigError(f"{where}: {key} holds {twice[:80]!r} twice")
    return tuple(out)


def _question_index(value: Any, questions: tuple[str, ...], at: str, where: str) -> int:
    if isinstance(value, str) and value in questions:
        return questions.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(questions):
        return value
    raise ConfigError(
        f"{where}: {at}.question is {str(value)[:80]!r}; expected the text of an extract question or its index "
        f"from 0 to {len(questions) - 1}"
    )


def _template(body: Mapping[str, Any], key: str, where: str) -> str:
    value = body.get(key) or ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {key} must be a text, found {type(value).__name__}")
    missing = [f"{{{f}}}" for f in ("question", "answer") if value and f"{{{f}}}" not in value]
    if missing:
        raise ConfigError(f"{where}: {key} lacks {' and '.join(missing)}, so the judge would not see the text")
    return value
