"""The sweep: train on what each ranking would keep, ask each model the questions, draw the curves.

`plan=true` says what it will cost and stops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    from jobs.retraining import Retraining, summary

    retraining = Retraining(pipeline)
    if pipeline.config.plan:
        from jobs.retraining_plan import plan

        print(plan(retraining))
        return
    data = retraining.run()
    print(summary(data))
    print(f"report: {retraining.page}.html\nnumbers: {retraining.page}.json\ntable: {retraining.page}.parquet")


main = entry("retrain", stages)

if __name__ == "__main__":
    main()
