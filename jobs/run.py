"""The main job: concept, generation where a scorer needs it, scores, selection, report. `plan=true` stops after the plan."""

from __future__ import annotations

from jobs.app import entry
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
