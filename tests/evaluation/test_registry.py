"""Evaluators by name: options, labels, what is said of wrong ones."""

from __future__ import annotations

import pytest

from curate.errors import ConfigError
from curate.evaluation import registry
from curate.evaluation.base import Evaluator
from curate.evaluation.registry import EVALUATORS, make_evaluators


class Asks(Evaluator):
    name = "asks"

    def __init__(self, path: str, samples: int = 1, seed: int = 0, words: list[str] | None = None) -> None:
        if samples < 1:
            raise ValueError("samples must be at least 1")
        self.given = (path, samples, seed, words)

    def fingerprint(self):
        return {"evaluator": self.name}

    def items(self, answers, likelihoods, judge):
        return []


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(registry.EVALUATORS, "asks", Asks)


def test_options_are_the_constructors():
    found = make_evaluators(
        {"asks": {"path": "x", "samples": 3, "words": None}, "twice": {"kind": "asks", "path": "y", "seed": 7}},
        {"seed": 4, "unheard": 1},
    )
    assert {label: e.given for label, e in found.items()} == {"asks": ("x", 3, 4, None), "twice": ("y", 1, 7, None)}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, r"no evaluator is chosen.*choose from .*'held_out_loss'"),
        ({"held_out_los": {"path": "x"}}, "there is no evaluator 'held_out_los'; did you mean 'held_out_loss'"),
        ({"mine": {"kind": "ask", "path": "x"}}, "there is no evaluator 'ask'; did you mean 'asks'"),
        ({"asks": {"path": "x", "sample": 3}}, "'asks' has no option 'sample'; did you mean 'samples'"),
        ({"asks": None}, "the evaluator 'asks' needs 'path': set evaluator.asks.path="),
        ({"asks": {"path": "x", "samples": 0}}, "settings of the evaluator 'asks' cannot be used: samples must be"),
        ({"asks": 3}, "settings of the evaluator 'asks' are 3"),
    ],
)
def test_wrong_ones_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        make_evaluators(settings)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -1}, "temperature is -1"),
     ({"top_p": 0}, "top_p is 0"), ({"max_new_tokens": "8"}, "max_new_tokens is '8'")],
)  # fmt: skip
def test_sampling_out_of_range_is_said_at_once(tmp_path, change, says):
    path = tmp_path / "t.yaml"
    path.write_text("name: t\nevaluate_questions: [why]\n")
    with pytest.raises(ConfigError, match=says):
        make_evaluators({"trait": {"path": str(path), **change}})


def test_names_are_the_classes_own():
    assert all(EVALUATORS[name].name == name for name in EVALUATORS)
