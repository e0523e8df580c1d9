"""Answer pairs: does a model prefer the answer that shows a behaviour to the one that does not?

In: a file of prompts with a positive answer (shows the behaviour) and a negative one (does not), or lists of them.
Out: per prompt the share of pairs in which the positive answer is the likelier (`preference`, 0-1) and by how much
(`margin`, nats per token), after length normalisation and without; and with `exact_match` whether the number that the
model's own answer ends on is the negative answer's, which is the right one. Knows no model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from curate.corpus.example import Message, Prompt
from curate.errors import ConfigError, near
from curate.evaluation.base import Candidate, Evaluator, Item, Likelihood, Metric, Sampling
from curate.evaluation.final_number import final_number
from curate.evaluation.judge import Judge
from curate.evaluation.questions import Row, check_names, digest_of, read_rows

log = logging.getLogger(__name__)

_LISTS = ("all", "first")
_METRICS = (
    Metric("preference", "Preference for the behaviour (per token)", "trait", 0.0, 1.0),
    Metric("margin", "Margin of the behaviour (nats per token)", "trait"),
    Metric("preference_sum", "Preference for the behaviour (whole answer)", "trait", 0.0, 1.0),
    Metric("margin_sum", "Margin of the behaviour (nats)", "trait"),
)
_MATCH = (
    Metric("accuracy", "Accuracy", "capability", 0.0, 1.0),
    Metric("no_number", "Answers without a number", "count", 0.0, 1.0),
)


@dataclass(frozen=True)
class Pair:
    """`positive` answers show the behaviour, `negative` ones do not. `number`: what a right answer ends on."""

    id: str
    prompt: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    number: Decimal | None = None
    group: str | None = None


class AnswerPairs(Evaluator):
    """Preference between given answers; see the module's docstring."""

    name: ClassVar[str] = "answer_pairs"

    def __init__(
        self,
        path: str,
        prompt: str = "prompt",
        positive: str = "positive",
        negative: str = "negative",
        id: str | None = None,
        group: str | None = None,
        lists: str = "all",
        first: int = 0,
        max_pairs: int | None = None,
        exact_match: bool = False,
        system: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        """
        Args:
            positive, negative: columns of one answer or a list of answers.
            group: column of what is resampled together for intervals (a topic).
            lists: `all` answers of a list are compared, each positive with each negative, or the `first` alone.
            first, max_pairs: rows [first, first + max_pairs) of the file; rows before `first` may be training rows.
            exact_match: also have the model answer, and compare the number it ends on (see final_number).

        A text that is both a positive and a negative answer says nothing and is left out; so is a row that then has no
        pair, with a log line.

        Raises:
            ConfigError: an unknown `lists`; a row that cannot be used, or no row left (names file, line and field).
            StorageError: the file cannot be read.
        """
        if lists not in _LISTS:
            raise ConfigError(f"answer_pairs.lists is {lists!r}, which is unknown{near(lists, _LISTS)}")
        rows = read_rows(path, first, max_pairs)
        names = [row.name(id) for row in rows]
        check_names(rows, names)
        read = [
            _pair(row, name, prompt, positive, negative, group, lists, exact_match)
            for row, name in zip(rows, names, strict=True)
        ]
        self.pairs = tuple(pair for pair in read if pair.positive and pair.negative)
        if not self.pairs:
            raise ConfigError(f"{path}: the {positive!r} and {negative!r} answers are the same in all {len(rows)} rows")
        if len(self.pairs) < len(read):
            log.info(
                "%s: %d of %d rows have equal answers and are left out", path, len(read) - len(self.pairs), len(read)
            )
        self.exact_match = exact_match
        self.metrics = (*_METRICS, *_MATCH) if exact_match else _METRICS
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        self._system = (Message("system", system),) if system else ()

    def fingerprint(self) -> dict[str, Any]:
        """See Evaluator."""
        asked = [[p.id, p.prompt, p.positive, p.negative, p.group] for p in self.pairs]
        if self.exact_match:  # its number may be that of an answer which is no pair's
            asked = [[*facts, str(p.number)] for facts, p in zip(asked, self.pairs, strict=True)]
        return {
            "pairs": digest_of(asked),
            "count": len(asked),
            "exact_match": self.exact_match,
            "system": [m.content for m in self._system],
            "rules": 1,  # of final_number: other rules, other items
        }

    def prompts(self) -> list[Prompt]:
        """See Evaluator."""
        return [Prompt(p.id, self._turns(p)) for p in self.pairs] if self.exact_match else []

    def candidates(self) -> list[Candidate]:
        """See Evaluator. Ids are `<row>/positive/<index>` and `<row>/negative/<index>`."""
        return [
            Candidate(f"{p.id}/{side}/{i}", self._turns(p), answer)
            for p in self.pairs
            for side, answers in (("positive", p.positive), ("negative", p.negative))
            for i, answer in enumerate(answers)
        ]

    def items(
        self, answers: Mapping[str, str], likelihoods: Mapping[str, Likelihood], judge: Judge | None
    ) -> list[Item]:
        """See Evaluator. A row whose answers do not all have a likelihood has no preference and no margin. An answer
        without a number is wrong."""
        out = []
        for p in self.pairs:
            shows = _found(likelihoods, f"{p.id}/positive/", len(p.positive))
            lacks = _found(likelihoods, f"{p.id}/negative/", len(p.negative))
            values: dict[str, float | None] = dict.fromkeys(m.name for m in _METRICS)
            if shows is not None and lacks is not None:
                for suffix, worth in (("", _per_token), ("_sum", _summed)):
                    a, b = [worth(x) for x in shows], [worth(x) for x in lacks]
                    values[f"preference{suffix}"] = preference(a, b)
                    values[f"margin{suffix}"] = sum(a) / len(a) - sum(b) / len(b)
            detail: dict[str, Any] = {"prompt": p.prompt, "positive": p.positive, "negative": p.negative}
            if self.exact_match:
                said = answers.get(p.id, "")
                number = final_number(said)
                values |= {"accuracy": float(number == p.number), "no_number": float(number is None)}
                detail |= {"answer": said, "number": None if number is None else str(number), "right": str(p.number)}
            out.append(Item(p.id, values, p.group, detail))
        return out

    def _turns(self, pair: Pair) -> tuple[Message, ...]:
        return (*self._system, Message("user", pair.prompt))


def preference(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Share of pairs (a of `positive`, b of `negative`) with a > b; a tie counts a half."""
    won = sum(float(a > b) + 0.5 * (a == b) for a in positive for b in negative)
    return won / (len(positive) * len(negative))


def _found(likelihoods: Mapping[str, Likelihood], prefix: str, n: int) -> list[Likelihood] | None:
    found = [likelihoods.get(f"{prefix}{i}") for i in range(n)]
    there = [x for x in found if x is not None and x.tokens > 0]
    return there if len(there) == n else None


def _per_token(likelihood: Likelihood) -> float:
    return likelihood.nats / likelihood.tokens


def _summed(likelihood: Likelihood) -> float:
    return likelihood.nats


def _pair(
    row: Row, name: str, prompt: str, positive: str, negative: str, group: str | None, lists: str, exact_match: bool
) -> Pair:
    shows, lacks = row.texts(positive), row.texts(negative)
    if lists == "first":
        shows, lacks = shows[:1], lacks[:1]
    number = None
    if exact_match:
        number = final_number(lacks[0])
        if number is None:
            raise ConfigError(f"{row.where}: {negative!r} holds no number to compare with; set exact_match=false")
    both = set(shows) & set(lacks)
    return Pair(
        name,
        row.text(prompt),
        tuple(dict.fromkeys(x for x in shows if x not in both)),
        tuple(dict.fromkeys(x for x in lacks if x not in both)),
        number,
        None if group is None else row.name(group),
    )
