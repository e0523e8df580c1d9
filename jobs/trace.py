"""Why the model answers test items so: the rows, the SAE latents of these and the tokens that made it; a page of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import trace_page
from jobs.app import entry
from jobs.tracing import Tracing

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    tracing = Tracing(pipeline)
    tracing.check()
    print(trace_page.write(tracing))


main = entry("trace", stages)

if __name__ == "__main__":
    main()
