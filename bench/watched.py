"""A job as a child process, as a person runs it, watched from outside: its memory, its lines, its commits, its end.

In: a job and its options. Out: what was seen of it. Knows the layout of an output place, and nothing of what the job
computes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.common import MemorySample, MemorySampler
from bench.stream import ray_group, spilled_bytes

ROOT = Path(__file__).parents[1]
_PART = re.compile(r"^(\d{12})-(\d{12})\.parquet$")

# Found by every Python process of the job: each row that was scored adds its number to a file, committed or not. From
# outside nobody could tell how many rows a killed actor had scored.
COUNTING = """
import importlib.machinery as machinery
load = machinery.SourceFileLoader.exec_module

def exec_module(self, module):
    load(self, module)
    if module.__name__ != "curate.scoring.shared_pass":
        return
    run = module.SharedPass.run

    def counted(self, examples, *arguments, **named):
        result = run(self, examples, *arguments, **named)
        with open({log!r}, "ab", buffering=0) as f:
            f.write("".join(f"{{e.row}}\\n" for e in examples).encode())
        return result

    module.SharedPass.run = counted

machinery.SourceFileLoader.exec_module = exec_module
"""


@dataclass(frozen=True)
class Commit:
    """One part: when it was committed (`time.time()`), its rows and its bytes."""

    at: float
    rows: int
    bytes: int


def commits(parts: Path) -> dict[str, Commit]:
    """The parts below the folder `parts`, by relative name."""
    found = {}
    for path in parts.rglob("*.parquet"):
        if m := _PART.match(path.name):
            status = path.stat()
            found[str(path.relative_to(parts))] = Commit(status.st_mtime, int(m[2]) - int(m[1]), status.st_size)
    return found


def folder_bytes(folder: Path) -> tuple[int, int]:
    """(files, bytes) below a folder."""
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return len(sizes), sum(sizes)


@dataclass
class Watched:
    """One run of a job. `lines`: (time, line of stderr). `gone` is when the last process of a killed one ended, Ray's
    agents left out."""

    began: float
    ended: float = 0.0
    killed: float | None = None
    gone: float | None = None
    status: int | None = None
    lines: list[tuple[float, str]] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)

    def when(self, words: str) -> float:
        """When the first line with these words came.

        Raises:
            RuntimeError: none did.
        """
        for at, line in self.lines:
            if words in line:
                return at
        raise RuntimeError(f"the job never said {words!r}; its last lines: {[x for _, x in self.lines[-5:]]}")


def run_job(
    job: str, options: Sequence[str], work: Path, parts: Path, kill_at: int | None = None, interval: float = 1.0
) -> Watched:
    """Run `curate <job> …`; with `kill_at`, SIGKILL its driver when that many parts are committed.

    Args:
        work: folder for the count of scored rows (`scored_rows`) and the job's own working directory.
        interval: seconds between samples of memory, and between looks at the parts.

    Raises:
        RuntimeError: the job failed, or ended before it could be killed.
    """
    site = work / "site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(COUNTING.format(log=str(work / "scored")))
    path = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CURATE_LOG": "text"}
    seen = Watched(time.time())
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", job, *options],
        cwd=work,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    errors = process.stderr

    def listen() -> None:
        for line in errors:
            seen.lines.append((time.time(), line.rstrip("\n")))
            print(line, end="", file=sys.stderr, flush=True)

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    family: list[psutil.Process] = []
    ours: list[psutil.Process] = []
    try:
        with MemorySampler(ray_group, interval, spilled_bytes(process.pid), process.pid) as memory:
            while process.poll() is None:
                if kill_at is not None and len(commits(parts)) >= kill_at:
                    family = psutil.Process(process.pid).children(recursive=True)
                    ours = [p for p in family if not _agent(p)]
                    seen.killed = time.time()
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    break
                time.sleep(interval)
            process.wait()
        seen.ended, seen.status, seen.memory = time.time(), process.returncode, memory.samples
        _, alive = psutil.wait_procs(ours, timeout=300)
        if alive:
            raise RuntimeError(f"processes outlived the killed driver by five minutes: {[p.cmdline() for p in alive]}")
        seen.gone = time.time()
    finally:
        for p in [*family, *_tree(process)]:
            try:
                p.kill()
            except psutil.NoSuchProcess:
                continue
    listening.join(timeout=10)
    if kill_at is not None and seen.killed is None:
        raise RuntimeError(f"the job ended with {seen.status} before {kill_at} parts were there")
    if kill_at is None and seen.status != 0:
        raise RuntimeError(f"the job failed with {seen.status}: {[x for _, x in seen.lines[-5:]]}")
    return seen


def _agent(process: psutil.Process) -> bool:
    """One of Ray's two agents of a node, which do no work of ours and need a minute to notice that it is gone?"""
    try:
        return any(word in " ".join(process.cmdline()) for word in ("Agent", "agent.py"))
    except psutil.Error:  # it has ended
        return True


def _tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process that is still there, with its descendants."""
    if process.poll() is not None:
        return []
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def scored_rows(work: Path) -> int:
    """Rows that any process of the jobs run with `work` has scored, committed or not."""
    return (work / "scored").read_bytes().count(b"\n")
