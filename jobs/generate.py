"""Generate the base model's own responses and keep them in the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    pipeline.generate()
    pipeline.print_places()


main = entry("generate", stages)

if __name__ == "__main__":
    main()
