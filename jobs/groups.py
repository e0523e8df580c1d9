"""Group rows by the SAE latents that fire on them and take whole groups by a score; a page, a table, curated shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry
from jobs.grouping import Grouping

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    print(Grouping(pipeline).run())


main = entry("groups", stages)

if __name__ == "__main__":
    main()
