"""Say what a run will cost: rows, tokens, FLOPs, time, bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    pipeline.plan()


main = entry("plan", stages)

if __name__ == "__main__":
    main()
