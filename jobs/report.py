"""Write report.html from the scores and the selection rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    pipeline.report()
    pipeline.print_places()


main = entry("report", stages)

if __name__ == "__main__":
    main()
