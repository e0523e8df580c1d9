"""The main job: concept, generation where needed, scores, selection, report. `plan=true` stops after the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    if pipeline.config.plan:
        pipeline.plan()
        return
    pipeline.score()
    pipeline.select()
    pipeline.report()
    pipeline.print_table()


main = entry("run", stages)

if __name__ == "__main__":
    main()
