"""Held-out loss: how well a model predicts the responses of rows that it was not trained on.

In: rows of any source that a corpus can be read from. Out: per row L(d) = mean of -log p(token | tokens before it) over
the response's tokens, end of turn included, in nats a token (METHODS §2; the loss of a fine-tune).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from connectors import registry
from connectors.packages import expand
from curate.corpus.example import ColumnMap, Example, content_id, to_example
from curate.errors import BadRow, ConfigError, near
from curate.evaluation.base import Candidate, Evaluator, Item, Likelihood, Metric
from curate.evaluation.judge import Judge
from curate.evaluation.questions import digest_of


class HeldOutLoss(Evaluator):
    """See the module's docstring."""

    name: ClassVar[str] = "held_out_loss"
    metrics = (Metric("loss", "Held-out loss (nats a token)", "loss", low=0.0),)

    def __init__(
        self,
        path: str | Sequence[str],
        columns: Mapping[str, str] | None = None,
        format: str = "auto",
        first: int = 0,
        max_rows: int | None = None,
    ) -> None:
        """Rows [first, first + max_rows) of `path`; `columns` as in source.columns.

        Raises:
            ConfigError: a row that cannot be used, no row at all, or an unknown column setting.
            CorpusError, StorageError: the source cannot be read, or its columns fit no layout.
        """
        if first < 0 or (max_rows is not None and max_rows < 1):
            raise ConfigError(f"held_out_loss: first={first}, max_rows={max_rows}; give first ≥ 0 and max_rows ≥ 1")
        known = ColumnMap.__dataclass_fields__
        for name in columns or {}:
            if name not in known:
                raise ConfigError(f"held_out_loss.columns has no {name!r}{near(name, known)}")
        wanted = ColumnMap(**{k: v for k, v in (columns or {}).items() if v is not None})  # type: ignore[arg-type]
        urls = [expand(path)] if isinstance(path, str) else [expand(p) for p in path]
        stop = None if max_rows is None else first + max_rows
        self._rows = list(islice(_read(urls, format, wanted), first, stop))
        if not self._rows:
            raise ConfigError(f"held_out_loss: there is no row [{first}, {stop or 'end'}) in {', '.join(urls)}")

    @classmethod
    def of(cls, rows: Sequence[Example]) -> HeldOutLoss:
        """The loss of rows that are in memory.

        Raises:
            ConfigError: there are none.
        """
        if not rows:
            raise ConfigError("held_out_loss: there is no row to ask")
        made = cls.__new__(cls)
        made._rows = list(rows)
        return made

    def fingerprint(self) -> dict[str, Any]:
        """See Evaluator."""
        text = "".join(content_id(row.messages) for row in self._rows)
        facts = {"rows": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), "count": len(self._rows)}
        groups = [row.group for row in self._rows]
        return facts if all(g is None for g in groups) else {**facts, "groups": digest_of(groups)}

    def candidates(self) -> list[Candidate]:
        """See Evaluator."""
        return [Candidate(str(i), row.prompt, row.response) for i, row in enumerate(self._rows)]

    def items(
        self, answers: Mapping[str, str], likelihoods: Mapping[str, Likelihood], judge: Judge | None
    ) -> list[Item]:
        """See Evaluator. Rows of one `group` column are resampled together."""
        out = []
        for i, row in enumerate(self._rows):
            found = likelihoods.get(str(i))
            value = -found.nats / found.tokens if found is not None and found.tokens else None
            tokens = None if found is None else found.tokens
            out.append(Item(f"{i}:{row.id}", {"loss": value}, row.group, {"tokens": tokens}))
        return out


def _read(urls: Sequence[str], file_format: str, columns: ColumnMap) -> Iterator[Example]:
    connector, infos = registry.discover(list(urls), file_format)
    for info in infos:
        entry, units = connector.scan(info, 1024)
        here = columns.resolve(entry.columns, entry.url)
        for unit in units:
            for _, _, rows in connector.read(unit, here.used()):
                for row in rows:
                    try:
                        if row.value is None:
                            raise BadRow(row.error or "unreadable row")
                        yield to_example(row.value, row.index, here)
                    except BadRow as e:
                        raise ConfigError(
                            f"held_out_loss: row {row.index} of {entry.url} cannot be used: {e.reason}; mend it or "
                            f"leave it out, so that all models are asked the same"
                        ) from None
