"""`python -m tests.faults.chaos`: kills of each kind over each job, one JSON line a trial, a table at the end.

The same command goes on where the last one ended: trials whose line is there are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.chaos.nodes import Nodes, nodes
from tests.faults.chaos.schedule import KINDS, Trial
from tests.faults.chaos.storage import Stored, failing_store, full_disk
from tests.faults.chaos.table import markdown
from tests.faults.chaos.trial import Outcome, environment, run_trial
from tests.faults.chaos.works import WORKS as KILLED
from tests.faults.chaos.works import Result, Work

WORKS: dict[str, type[Work]] = {**KILLED, Stored.name: Stored}
KINDS_OF = {
    "score": ("driver", "actor", "reader", "raylet", "node"),
    "generate": ("driver", "actor"),
    "vllm": ("driver", "actor"),
    "fit": ("driver", "actor", "raylet", "node"),
    "sweep": ("driver", "actor", "node"),
    "audit": ("driver", "actor", "node"),
    "storage": ("errors", "outages", "slow", "truncated", "full"),
}


def main() -> None:
    chosen = arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    lines = chosen.out / f"seed-{chosen.seed}.jsonl"
    done = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    end = time.monotonic() + 60 * chosen.minutes
    pairs = [(j, k) for j in chosen.jobs for k in (*KINDS_OF[j], "mixed") if k in chosen.kinds]
    todo = [(j, k) for j, k in pairs if (j, k) != ("storage", "mixed") and kills(done, j, k) < chosen.kills]
    if todo:
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        with Chaos(folder, chosen.pause) as chaos:
            for job, kind in todo:
                while kills(done, job, kind) < chosen.kills and time.monotonic() < end:
                    number = sum(o["job"] == job and o["kind"] == kind for o in done)
                    left = chosen.kills - kills(done, job, kind)
                    outcome = chaos.run(Trial(chosen.seed, job, kind, number), min(left, chosen.per_trial))
                    done.append(asdict(outcome))
                    tell(outcome, lines)
        if all(Outcome(**o).good for o in done):
            shutil.rmtree(folder)
    (chosen.out / f"seed-{chosen.seed}.md").write_text(markdown(done) + "\n")
    print(markdown(done), flush=True)
    bad = [o["trial"] for o in done if not Outcome(**o).good]
    if bad:
        sys.exit(f"not as the undisturbed run, or more redone than allowed: {', '.join(bad)}")


class Chaos(ExitStack):
    """What trials share: a model, the undisturbed results, and nodes, which start with the first trial that kills."""

    def __init__(self, folder: Path, pause: float) -> None:
        super().__init__()
        self.folder, self.pause, self.log = folder, pause, folder / "begun"
        self.model = tiny(folder)
        self._nodes: Nodes | None = None
        self._wanted: dict[str, tuple[Work, Result, int]] = {}

    def run(self, trial: Trial, kills: int) -> Outcome:
        """One trial, with at most `kills` kills; what it wrote stays if something is wrong."""
        if trial.job not in self._wanted:
            made = WORKS[trial.job](self.folder, self.model)
            self._wanted[trial.job] = (made, *made.undisturbed())
        work, want, commits = self._wanted[trial.job]
        place = self.folder / "trials"
        if isinstance(work, Stored):
            run = full_disk if trial.kind == "full" else failing_store
            outcome = run(trial, work, want, place)
        else:
            if self._nodes is None:
                self._nodes = self.enter_context(nodes(2, 2, environment(self.log, self.pause)))
            self._nodes.fill()
            moments = trial.moments(commits, min(kills, commits - 2), self.pause, KINDS_OF[trial.job])
            outcome = run_trial(trial, work, self._nodes, moments, want, place, self.log)
        if outcome.good:
            shutil.rmtree(place / trial.name)
        return outcome


def arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20, help="kills of each kind over each job")
    parser.add_argument("--per-trial", type=int, default=5, help="kills in one run of a job")
    parser.add_argument("--minutes", type=float, default=600, help="begin no trial after so many minutes")
    parser.add_argument("--pause", type=float, default=0.04, help="seconds that each piece of work lasts longer")
    parser.add_argument("--jobs", nargs="+", choices=KINDS_OF, default=list(KINDS_OF))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[k for k in KINDS if k != "mixed"])
    parser.add_argument("--out", type=Path, default=Path("out/chaos"))
    return parser.parse_args()


def kills(done: list[dict[str, Any]], job: str, kind: str) -> int:
    return sum(o["kills"] for o in done if o["job"] == job and o["kind"] == kind)


def tell(outcome: Outcome, lines: Path) -> None:
    line = json.dumps(asdict(outcome), ensure_ascii=False)
    with lines.open("a", encoding="utf-8") as f:
        f.write(line + "\n")
        f.flush()
        os.fsync(f.fileno())
    print(line, flush=True)


def tiny(folder: Path) -> Path:
    """The tiny model, with a concept file beside it."""
    import numpy as np

    from curate.concepts import concept as files
    from curate.concepts.concept import Concept
    from curate.models.load import ModelSpec, identity
    from tests.tiny import save_tiny

    model = save_tiny(folder / "model", layers=3)
    who = identity(ModelSpec(str(model)))
    vectors = np.random.default_rng(0).normal(size=(who["layers"] + 1, who["width"])).astype(np.float32)
    files.save(Concept("test", vectors, 2, who, "random", "response_mean"), str(folder / "concept"))
    return model


if __name__ == "__main__":
    main()
