"""Ask the model, with its adapters, what the configured evaluators want to know; a table and <sink>/evaluation.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry
from jobs.evaluation import Evaluating

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    evaluating = Evaluating(pipeline)
    evaluating.check()
    print(evaluating.report(evaluating.run(evaluating.models)))


main = entry("evaluate", stages)

if __name__ == "__main__":
    main()
