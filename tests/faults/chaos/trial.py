"""One trial: a job on the nodes, its kills, the same command again where the job itself was killed, and the findings.

In: a Trial, its Work, running Nodes. Out: an Outcome. What it does not do: choose moments, or judge what comes out of
several trials.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.chaos import nodes as processes
from tests.faults.chaos.nodes import Nodes
from tests.faults.chaos.schedule import Moment, Trial
from tests.faults.chaos.works import WORKERS, Result, Work, differences, half_files, rows_of
from tests.jobs.helpers import ROOT

STUCK_SECONDS = 300.0  # without a commit, or an end
GONE_SECONDS = 60.0  # within which workers of a dead driver or raylet must be gone
AGENT_SECONDS = 120.0  # Ray's two agents of a node, which write nothing of ours, notice later


@dataclass
class Outcome:
    """What became of a trial. Counts of pieces (rows of scores, files of other products) are against the undisturbed
    run; `redone` are pieces that were begun again, of which `allowed` may be."""

    trial: str
    job: str
    kind: str
    kills: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    doubled: int = 0
    different: int = 0
    redone: int = 0
    allowed: int = 0
    orphans: int = 0
    half: int = 0
    ended: int = 0
    seconds: float = 0.0
    gone: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        wrong = (self.lost, self.doubled, self.different, self.orphans, self.half)
        if any(wrong) or self.redone > self.allowed:
            return False
        return not self.ended or self.job == "storage"  # a job whose store fails may say so and end


class Watched:
    """Processes that have to end by themselves: since when, and how long each kind may take."""

    def __init__(self) -> None:
        self._doomed: list[tuple[psutil.Process, float, float]] = []
        self._overdue: list[str] = []
        self._looked = 0.0
        self.longest = 0.0

    def doom(self, family: list[psutil.Process]) -> None:
        now = time.monotonic()
        for process in family:
            self._doomed.append((process, now, AGENT_SECONDS if "Agent" in title(process) else GONE_SECONDS))

    def look(self) -> None:
        """Which of them are gone by now; once a second is enough."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        self._looked, alive = now, []
        for process, since, allowed in self._doomed:
            if not lives(process):
                self.longest = max(self.longest, now - since if allowed == GONE_SECONDS else 0.0)
            elif now - since > allowed:
                self._overdue.append(f"{process.pid} {title(process)[:80]}")
                processes.kill(process)
            else:
                alive.append((process, since, allowed))
        self._doomed = alive

    def orphans(self) -> list[str]:
        """Those that had their time and lived, after waiting until each is gone or has had its time."""
        while any(allowed == GONE_SECONDS for _, _, allowed in self._doomed):
            self.look()
            time.sleep(0.05)
        return self._overdue


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title(process: psutil.Process) -> str:
    try:
        return process.name() + " " + " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@dataclass
class Run:
    """A trial under way."""

    trial: Trial
    work: Work
    nodes: Nodes
    place: Path
    watched: Watched
    outcome: Outcome
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        self.starts += 1
        more = ["cluster=existing", f"cluster.ray_address={self.nodes.address}"]
        command = [sys.executable, "-m", "jobs.cli", self.work.job, *self.work.given(self.place), *more]
        with (self.place / f"log-{self.starts}.txt").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def said(self) -> str:
        return (self.place / f"log-{self.starts}.txt").read_text(errors="replace")[-1500:]

    def status(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def until(self, reached: Callable[[], Any]) -> Any:
        """What `reached` answers, once that is true; None where the job has ended, or stands still for too long."""
        commits, since = -1, time.monotonic()
        while not (found := reached()):
            now = self.work.commits(self.place)
            if now != commits:
                commits, since = now, time.monotonic()
            if self.status() is not None:
                return None
            self.watched.look()
            if time.monotonic() - since > STUCK_SECONDS:
                self.outcome.notes.append(f"no commit and no end for {STUCK_SECONDS:g} s: {self.said()[-400:]}")
                self.outcome.ended += 1
                self.end_driver()
                return None
            time.sleep(0.02)
        return found

    def end_driver(self) -> None:
        assert self.process is not None
        self.watched.doom([p for _, p, _ in self.nodes.workers()] + processes.children(self.process.pid))
        self.process.kill()
        self.process.wait()

    def victims(self, kind: str) -> list[Any]:
        """What a kill of this kind may hit now: processes, or nodes that are at work."""
        at_work = self.nodes.workers()
        match kind:
            case "actor":
                return [(n, p) for n, p, doing in at_work if doing.startswith(self.work.actor)]
            case "reader":
                return [(n, p) for n, p, doing in at_work if doing.startswith("MapBatches(")]
            case "raylet" | "node":
                return list({id(n): n for n, _, _ in at_work}.values())
        return [None]

    def strike(self, moment: Moment) -> bool:
        """One kill; False where the job ended before."""
        if not self.until(lambda: self.work.commits(self.place) >= moment.commits):
            return False
        time.sleep(moment.wait)
        found = self.until(lambda: self.victims(moment.kind))
        if not found or self.status() is not None:
            return False
        victim = found[int(moment.draw * len(found))]
        match moment.kind:
            case "driver":
                self.end_driver()
                self.outcome.allowed += WORKERS
            case "actor" | "reader":
                processes.kill(victim[1])
                self.watched.doom([victim[1]])
                self.outcome.allowed += moment.kind == "actor"
            case kind:
                busy = [n for n, _, doing in self.nodes.workers() if doing.startswith(self.work.actor)]
                self.outcome.allowed += sum(n is victim for n in busy)
                self.watched.doom(self.nodes.kill(victim, whole=kind == "node"))
                self.nodes.fill()
        told = {"trial": self.trial.name, "killed": moment.kind, "after_commits": moment.commits, "start": self.starts}
        print(json.dumps(told), flush=True)
        self.outcome.kills += 1
        self.outcome.hits[moment.kind] = self.outcome.hits.get(moment.kind, 0) + 1
        return True


def run_trial(
    trial: Trial, work: Work, running: Nodes, moments: list[Moment], want: Result, folder: Path, log: Path
) -> Outcome:
    """Run it; see the module's docstring. `log`: where sitecustomize notes what is begun."""
    place = folder / trial.name
    place.mkdir(parents=True)
    outcome = Outcome(trial.name, trial.job, trial.kind)
    run = Run(trial, work, running, place, Watched(), outcome)
    began = time.monotonic()
    run.start()
    for moment in moments:
        struck = run.strike(moment)
        if not struck and run.status() == 0:
            break
        if run.status() is not None:
            _again(run)
    run.until(lambda: run.status() is not None)
    while run.status() != 0 and outcome.ended <= 3:
        _again(run)
        run.until(lambda: run.status() is not None)
    outcome.seconds = round(time.monotonic() - began, 1)
    run.watched.doom([p for _, p, doing in running.workers() if doing.startswith(work.actor)])
    if run.status() == 0:
        _compare(run, want)
    outcome.redone = redone(log, place)
    orphans = run.watched.orphans()
    outcome.orphans, outcome.gone = len(orphans), round(run.watched.longest, 1)
    outcome.notes += [f"lives on: {o}" for o in orphans]
    return outcome


def _again(run: Run) -> None:
    """The same command; a driver that ended itself is noted."""
    assert run.process is not None
    if run.process.returncode not in (0, -9):
        run.outcome.ended += 1
        run.outcome.notes.append(f"the job ended itself with {run.process.returncode}: {run.said()[-600:]}")
    run.start()


def _compare(run: Run, want: Result) -> None:
    outcome, place = run.outcome, run.place
    if stray := half_files(place):
        outcome.half, outcome.notes = len(stray), [*outcome.notes, *stray[:3]]
    run.work.finish(place)
    found = run.work.result(place)
    odd, unlike = differences(found, want)
    outcome.different = len(unlike)
    outcome.lost, outcome.doubled = len(want.keys() - found.keys()), len(found.keys() - want.keys())
    if run.work.name == "score":
        scored, ledger = rows_of(place)
        times, expected = Counter(scored), set(ledger)
        outcome.lost += len(expected - times.keys())
        outcome.doubled += sum(n - 1 for n in times.values()) + len(ledger) - len(expected)
    outcome.notes += [f"differs: {n}" for n in (*odd, *unlike)[:5]]


def redone(log: Path, place: Path) -> int:
    """Pieces below `place` that were begun again, by what the workers noted."""
    lines = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    begun = Counter((where, what) for where, _, what in lines if where.startswith(str(place)))
    return sum(n - 1 for n in begun.values())


def environment(log: Path, pause: float) -> dict[str, str]:
    """What every process of a chaos run is given."""
    site = str(Path(__file__).parent / "site")
    return {
        "PYTHONPATH": os.pathsep.join([site, str(ROOT)]),
        "CHAOS_LOG": str(log),
        "CHAOS_PAUSE": str(pause),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's own 15 would starve workers beside whatever else this machine does
    }
