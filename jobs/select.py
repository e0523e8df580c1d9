"""Rank by a score column that is there, write curated shards and the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    pipeline.select()
    pipeline.print_places()


main = entry("select", stages)

if __name__ == "__main__":
    main()
