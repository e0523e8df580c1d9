"""Evaluators by name: settings in, evaluators out. To add one, write its file and name its class here.

The keyword arguments of an evaluator's constructor are its settings. An evaluator is known by the key of its settings,
which is also what it does unless `kind` says so: with ``{"maths": {"kind": "held_out_loss", "path": …}}`` one class
serves under several labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from curate.errors import ConfigError, near
from curate.evaluation.answer_pairs import AnswerPairs
from curate.evaluation.base import Evaluator
from curate.evaluation.held_out_loss import HeldOutLoss
from curate.evaluation.mt_bench import MTBench
from curate.evaluation.multiple_choice import MultipleChoice
from curate.evaluation.trait import TraitScore

EVALUATORS: dict[str, type[Evaluator]] = {
    evaluator.name: evaluator for evaluator in (HeldOutLoss, TraitScore, MultipleChoice, AnswerPairs, MTBench)
}


def make_evaluators(
    settings: Mapping[str, Mapping[str, Any] | None], defaults: Mapping[str, Any] | None = None
) -> dict[str, Evaluator]:
    """Evaluators by label for ``{"held_out_loss": {"path": "rows.jsonl"}}``, in that order.

    `defaults` are for options that an evaluator has and that are not given: {"seed": 0}.

    Raises:
        ConfigError: an unknown evaluator or option (the message says which are near), a missing option, or one that
            the evaluator cannot use; no evaluator at all.
    """
    if not settings:
        raise ConfigError(f"no evaluator is chosen (evaluator=[…]){near('', EVALUATORS)}")
    return {label: _make(label, options or {}, defaults or {}) for label, options in settings.items()}


def _make(label: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Evaluator:
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"the settings of the evaluator {label!r} are {options!r}; expected names and values, or none"
        )
    kind = str(options.get("kind") or label)
    if kind not in EVALUATORS:
        raise ConfigError(f"there is no evaluator {kind!r}{near(kind, EVALUATORS)}")
    parameters = inspect.signature(EVALUATORS[kind]).parameters
    unknown = next((name for name in options if name not in parameters and name != "kind"), None)
    if unknown is not None:
        raise ConfigError(f"the evaluator {kind!r} has no option {unknown!r}{near(unknown, parameters)}")
    arguments = {name: value for name, value in options.items() if value is not None and name != "kind"}
    arguments = {**{name: value for name, value in defaults.items() if name in parameters}, **arguments}
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise ConfigError(f"the evaluator {label!r} needs {missing[0]!r}: set evaluator.{label}.{missing[0]}=…")
    try:
        return EVALUATORS[kind](**arguments)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"the settings of the evaluator {label!r} cannot be used: {e}") from e
