"""Labelled rows for a probe: a few thousand examples with their labels, from any source that a corpus may have.

In: URLs, a format, columns. Out: Examples on the driver, and the digests of their files. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from connectors import registry
from curate.corpus.example import ColumnMap, Example, to_example
from curate.errors import BadRow, ConceptError, ConfigError, near
from curate.runtime.events import say


@dataclass(frozen=True)
class LabelledRows:
    """`digests`: of the files, for recipes."""

    examples: list[Example]
    digests: list[str]

    @property
    def labels(self) -> list[str]:
        return [str(e.label) for e in self.examples]

    @property
    def groups(self) -> list[str] | None:
        """The rows' groups; a row without one is its own. None where no row has one."""
        if all(e.group is None for e in self.examples):
            return None
        return [f"group {e.group}" if e.group is not None else f"row {i}" for i, e in enumerate(self.examples)]


def labelled_rows(
    url: str | list[str],
    file_format: str,
    columns: ColumnMap,
    positive_label: str,
    max_rows: int,
    what: str,
    setting: str,
) -> LabelledRows:
    """The first `max_rows` usable rows; those that cannot be used are left out and counted.

    Args:
        what: names the work to the user. setting: where its settings stand, for messages.

    Raises:
        ConfigError: no label column is named.
        ConceptError: no usable row, or none with the positive label.
    """
    if columns.label is None:
        raise ConfigError(f"a probe needs labels; name their column: {setting}.columns.label=…")
    connector, infos = registry.discover(url, file_format)
    examples: list[Example] = []
    digests, bad = [], 0
    for info in infos:
        entry, units = connector.scan(info, 1024)
        digests.append(entry.digest)
        resolved = columns.resolve(entry.columns, entry.url)
        for unit in units:
            if len(examples) >= max_rows:
                break
            for _, _, rows in connector.read(unit, resolved.used()):
                for row in rows:
                    try:
                        if row.value is None:
                            raise BadRow(row.error or "unreadable row")
                        example = to_example(row.value, row.index, resolved)
                        if example.label is None:
                            raise BadRow("no label")
                        examples.append(example)
                    except BadRow:
                        bad += 1
    found = LabelledRows(examples[:max_rows], digests)
    if bad:
        say(f"{what}: {bad} labelled rows cannot be used and are left out")
    if not found.examples:
        raise ConceptError(f"{what}: {url!r} has no usable labelled row for the probe")
    if positive_label not in found.labels:  # said before the model runs, not after
        raise ConceptError(
            f"{what}: no row of {url!r} has the label {positive_label!r}{near(positive_label, found.labels)}"
        )
    return found
