"""Score every row of the source; parts go to <sink>/scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    pipeline.score()
    pipeline.print_places()


main = entry("score", stages)

if __name__ == "__main__":
    main()
