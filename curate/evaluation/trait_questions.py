"""Trait questions: what is asked to see how much of a trait a model shows, and the judge's templates for the answers.

In: a trait file (its evaluate_questions, judge_prompt and coherence_prompt, see curate.concepts.trait) or a list of
free-form questions as the emergent-misalignment project writes them: `id`, `paraphrases` (or `paraphrase`), optional
`system`, and `judge_prompts` {name: template}. Out: TraitQuestions. Knows no judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from connectors import storage
from connectors.packages import expand
from curate.concepts.trait import load_trait
from curate.errors import ConfigError, near
from curate.evaluation.questions import Row, check_names, read_rows

_FREE_FORM = ("free_form", "free_form_judge_0_100")


@dataclass(frozen=True)
class TraitQuestion:
    """One way of asking. `group`: paraphrases of one question share it. Templates hold {question} and {answer}; empty
    where the file gives none."""

    id: str
    group: str
    text: str
    judge_prompt: str
    coherence_prompt: str = ""
    system: str | None = None


def load_trait_questions(
    path: str,
    judge_key: str | None = None,
    coherence_key: str = "coherent",
    first: int = 0,
    max_questions: int | None = None,
) -> tuple[TraitQuestion, ...]:
    """Questions [first, first + max_questions) of a file; the paraphrases of one count as one.

    Args:
        judge_key: in a list of free-form questions, which of the judge_prompts asks for the trait; None = the only one
            beside `coherence_key`.

    Raises:
        ConfigError: a file of another form, a question that cannot be used, a template without its fields, no question
            left. StorageError: the file cannot be read.
    """
    url = expand(path)
    if _holds_list(url):
        rows = read_rows(url, first, max_questions)
        check_names(rows, [row.name(None) for row in rows])
        return tuple(q for row in rows for q in _free_form(row, judge_key, coherence_key))
    if judge_key is not None:
        raise ConfigError(f"{path} is a trait file and has one judge_prompt; leave judge_key out")
    trait = load_trait(url)
    texts = trait.questions("evaluate")[first : None if max_questions is None else first + max_questions]
    if not texts or first < 0:
        raise ConfigError(
            f"trait {trait.name!r} has {len(trait.evaluate_questions)} evaluate_questions, so none are in the range "
            f"first={first}, max_questions={max_questions}"
        )
    return tuple(
        TraitQuestion(str(i), str(i), text, trait.judge_prompt, trait.coherence_prompt)
        for i, text in enumerate(texts, first)
    )


def _holds_list(url: str) -> bool:
    """Whether the file is a list of questions rather than one trait."""
    suffix = url.split("?")[0].rpartition(".")[2].lower()
    if suffix == "jsonl":
        return True
    if suffix not in ("json", "yaml", "yml"):
        raise ConfigError(f"trait questions {url}: unknown suffix {suffix!r}; expected .json, .jsonl, .yaml or .yml")
    text = storage.read_text(url)
    try:
        return isinstance(json.loads(text) if suffix == "json" else yaml.safe_load(text), list)
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        raise ConfigError(f"{url} cannot be parsed: {e}") from e


def _free_form(row: Row, judge_key: str | None, coherence_key: str) -> list[TraitQuestion]:
    kind = row.values.get("type", _FREE_FORM[0])
    if kind not in _FREE_FORM:
        raise ConfigError(f"{row.where}: 'type' is {kind!r}; only free-form questions judged 0-100 can be asked")
    prompts = row.get("judge_prompts")
    if not isinstance(prompts, Mapping) or not prompts:
        raise ConfigError(f"{row.where}: 'judge_prompts' must be an object of templates by name")
    names = [str(name) for name in prompts if name != coherence_key]
    if judge_key is None and len(names) != 1:
        raise ConfigError(f"{row.where}: 'judge_prompts' has {sorted(names)}; name the trait's with judge_key")
    key = names[0] if judge_key is None else judge_key
    if key not in prompts:
        raise ConfigError(f"{row.where}: 'judge_prompts' has no {key!r}{near(key, prompts)} (judge_key)")
    templates = Row(row.number, f"{row.where}: 'judge_prompts'", prompts)
    asks = _template(templates, key)
    coherence = _template(templates, coherence_key) if coherence_key in prompts else ""
    system = row.text("system") if row.values.get("system") is not None else None
    texts = row.texts("paraphrases" if "paraphrases" in row.values else "paraphrase")
    group = row.name(None)
    return [TraitQuestion(f"{group}/{i}", group, text, asks, coherence, system) for i, text in enumerate(texts)]


def _template(prompts: Row, key: str) -> str:
    text = prompts.text(key)
    missing = [f"{{{f}}}" for f in ("question", "answer") if f"{{{f}}}" not in text]
    if missing:
        raise ConfigError(
            f"{prompts.where}: {key!r} lacks {' and '.join(missing)}, so the judge would not see the text"
        )
    return text
