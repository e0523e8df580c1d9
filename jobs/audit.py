"""A recurring audit of a growing corpus: score what is new, compare it with a baseline, ask the rules, tell.

Exit status: 0 nothing drifted (or nothing is new), 2 an error that a person can mend, 3 a rule of severity `fail`
fired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry
from jobs.auditing import Auditing

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    auditing = Auditing(pipeline)
    auditing.check()
    auditing.run()


main = entry("audit", stages)

if __name__ == "__main__":
    main()
