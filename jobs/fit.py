"""Fit curvature factors and make the test vectors of the influence scorers; both are kept in the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    pipeline.fit()
    print(pipeline.influence.told())


main = entry("fit", stages)

if __name__ == "__main__":
    main()
