"""Evaluators: what is asked of a trained model, and what its answers are worth.

An Evaluator says which prompts are to be answered and which responses' likelihoods are wanted; whoever runs it has a
model (with an adapter or without) do that and hands back the answers; the evaluator makes Items of them. Knows no
engine, no cluster and no arm.

In: questions. Out: one Item a question with named values, summarised to Measures with bootstrap intervals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from curate.corpus.example import Message, Prompt
from curate.errors import ConfigError
from curate.evaluation.judge import Judge


@dataclass(frozen=True)
class Sampling:
    """How an evaluator's prompts are answered. `temperature=0` takes the likeliest token.

    Raises:
        ConfigError: a number out of its range; said here, as engines would say it after hours of other work.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens!r}; expected a whole number, 1 or more")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be in (0, 1]")


@dataclass(frozen=True)
class Candidate:
    """A response to a conversation whose likelihood is wanted."""

    id: str
    messages: tuple[Message, ...]
    response: str


@dataclass(frozen=True)
class Likelihood:
    """`nats`: log-probability of the response's tokens, end of turn included, summed. `tokens`: how many they are."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class Item:
    """What was found for one question. `values`: by metric; None where there is none (a refusal, an unreadable answer),
    no entry where the metric does not apply (another category's).

    `group`: items of one group are resampled together (several answers to one question). `detail`: for the reader: the
    question, the answer, a judge's reason.
    """

    id: str
    values: Mapping[str, float | None]
    group: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """`sense`: what more of it means: more of the behaviour (trait), better (capability), worse fit (loss), or neither
    (count). `low`, `high`: its natural range, for axes; None = open."""

    name: str
    title: str
    sense: Literal["trait", "capability", "loss", "count"]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """The mean of a metric over items, with a 95 % bootstrap interval (None below two groups). `missing`: items without
    a value."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    missing: int


class Evaluator(ABC):
    """See the module's docstring. All methods but `items` are cheap; none has state.

    `judged`: `items` asks the judge, and cannot do without.
    """

    name: ClassVar[str]
    metrics: tuple[Metric, ...]
    sampling: Sampling = Sampling()
    judged: bool = False

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What changes an item, for recipes: JSON values."""

    def check(self, judge: Judge | None) -> None:
        """Called before any work: whether `items` can ask this judge what it has to ask.

        Raises:
            ConfigError: it cannot; names the setting.
        """
        if self.judged and judge is None:
            raise ConfigError(f"the evaluator {self.name!r} asks a judge, and there is none")

    def prompts(self) -> Sequence[Prompt]:
        """To be answered; ids are unique within the evaluator."""
        return ()

    def follow_ups(self, answers: Mapping[str, str]) -> Sequence[Prompt]:
        """Prompts that build on the answers to the first ones, all of them (second turns); ids are new ones."""
        return ()

    def candidates(self) -> Sequence[Candidate]:
        """Responses whose likelihood is wanted."""
        return ()

    @abstractmethod
    def items(
        self, answers: Mapping[str, str], likelihoods: Mapping[str, Likelihood], judge: Judge | None
    ) -> list[Item]:
        """One Item a question.

        Args:
            answers: text by prompt id, follow-ups included; empty where the engine had no answer.
            likelihoods: by candidate id; without those that are too long for the model or came out not finite.
        """


def summarise(
    items: Sequence[Item], metrics: Sequence[Metric], replicates: int = 1000, seed: int = 0
) -> dict[str, Measure]:
    """Mean of each metric over items, and the percentile interval of `replicates` resamples of groups.

    Resampling groups and not items, as answers to one question are not independent. Same seed, same interval.
    """
    out = {}
    for metric in metrics:
        found = [(i.group or i.id, i.values[metric.name]) for i in items if metric.name in i.values]
        pairs = [(g, float(v)) for g, v in found if v is not None]
        missing = len(found) - len(pairs)
        if not pairs:
            out[metric.name] = Measure(None, None, None, 0, missing)
            continue
        names, index = np.unique([g for g, _ in pairs], return_inverse=True)
        sums = np.bincount(index, weights=[v for _, v in pairs])
        counts = np.bincount(index).astype(float)
        low = high = None
        if len(names) > 1 and replicates > 0:
            rng, even, means = np.random.default_rng(seed), np.full(len(names), 1 / len(names)), []
            for start in range(0, replicates, 50):  # a few at once: 1000 resamples of 100,000 groups fill a gigabyte
                drawn = rng.multinomial(len(names), even, min(50, replicates - start))
                means.append(drawn @ sums / (drawn @ counts))
            low, high = (float(x) for x in np.percentile(np.concatenate(means), [2.5, 97.5]))
        out[metric.name] = Measure(float(sums.sum() / counts.sum()), low, high, len(pairs), missing)
    return out


def paired(
    items: Sequence[Item], against: Sequence[Item], metrics: Sequence[Metric], replicates: int = 1000, seed: int = 0
) -> dict[str, Measure]:
    """Mean `items` − `against` of each metric over the questions that have a value of both, and its interval.

    Two models answer the same questions, and how hard a question is cancels: the interval is often much narrower than
    those of the two means. A question that lacks one of the values is `missing`.
    """
    theirs = {item.id: item.values for item in against}
    differences = []
    for item in items:
        if (other := theirs.get(item.id)) is None:
            continue
        values = {name: _minus(v, other[name]) for name, v in item.values.items() if name in other}
        differences.append(Item(item.id, values, item.group))
    return summarise(differences, metrics, replicates, seed)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else float(a) - float(b)
