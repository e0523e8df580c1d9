"""Make the configured concepts and keep them in the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    pipeline.concepts()
    pipeline.print_concepts()


main = entry("concept", stages)

if __name__ == "__main__":
    main()
