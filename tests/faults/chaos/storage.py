"""Trials in which nothing is killed and the storage fails: the main job on a failing store, and on a full disk.

In: a Trial. Out: an Outcome whose `kills` are the faults. The job may end itself, by a sentence and with status 2; the
same command, again and again, must come to what an undisturbed run makes.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.chaos.schedule import Trial
from tests.faults.chaos.store import failing
from tests.faults.chaos.trial import Outcome
from tests.faults.chaos.works import Result, Score, columns, differences, half_files
from tests.jobs.helpers import ROOT, inline
from tests.s3_server import serve

RUNS = 12  # of the same command, at the most
SECONDS = 400.0  # of one


@dataclass(frozen=True)
class Stored(Score):
    """The main job over the corpus of `Score`, of which parts and curated shards are compared."""

    name = "storage"

    @property
    def job(self) -> str:
        return "run"

    def given(self, place: Path) -> list[str]:
        return [o if not o.startswith("source.unit_rows=") else "source.unit_rows=20" for o in super().given(place)]

    def finish(self, place: Path) -> None:
        """The job itself has selected."""


def full_disk(trial: Trial, work: Stored, want: Result, folder: Path) -> Outcome:
    """Writes fail for want of space, at random (see site/sitecustomize.py), each run by another draw."""
    place = folder / trial.name
    place.mkdir(parents=True)
    outcome = Outcome(trial.name, trial.job, trial.kind)
    began = time.monotonic()
    log = place / "full"
    done = _again_and_again(work.given(place), place, outcome, {"CHAOS_LOG": str(place / "begun")}, log, trial.name)
    outcome.kills = len(log.read_text().splitlines()) if log.exists() else 0
    if done:
        outcome.notes += (stray := half_files(place))
        outcome.half = len(stray)
        _compare(outcome, work.result(place), want)
    outcome.seconds = round(time.monotonic() - began, 1)
    return outcome


def failing_store(trial: Trial, work: Stored, want: Result, folder: Path) -> Outcome:
    """Source, sink and store lie in a bucket behind a proxy that fails."""
    place = folder / trial.name
    place.mkdir(parents=True)
    outcome = Outcome(trial.name, trial.job, trial.kind)
    with serve() as behind:
        client, bucket = behind.client(), "chaos"
        behind.bucket(bucket)
        local = work.given(place)
        source = next(o for o in local if o.startswith("source.url=")).removeprefix("source.url=")
        for path in Path(source).iterdir():
            client.upload_file(str(path), bucket, f"corpus/{path.name}")
        moved = {"source.url": "corpus/", "sink.url": "out", "sink.store": "store"}
        given = [o for o in local if o.split("=")[0] not in moved]
        given += [f"{name}=s3://{bucket}/{where}" for name, where in moved.items()]
        began = time.monotonic()
        with failing(behind, trial.kind, trial.name) as (endpoint, proxy):
            done = _again_and_again(given, place, outcome, endpoint.environment, None, trial.name)
        outcome.kills = proxy.faults
        outcome.seconds = round(time.monotonic() - began, 1)
        if not done:
            return outcome
        found: Result = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for item in page.get("Contents", []):
                key = item["Key"]
                body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
                if key.endswith(".parquet"):
                    try:
                        table = pq.read_table(io.BytesIO(body))
                    except pa.ArrowInvalid as e:
                        outcome.half += 1
                        outcome.notes.append(f"{key}: {e}")
                        continue
                    for root in ("out/scores/parts/", "out/ledger/"):
                        if key.startswith(root):
                            found |= columns(key.removeprefix(root), table)
                elif key.startswith("out/curated/"):
                    found[key.removeprefix("out/")] = body
    _compare(outcome, found, want)
    return outcome


def _again_and_again(
    given: list[str], place: Path, outcome: Outcome, env: dict[str, str], full: Path | None, name: str
) -> bool:
    """Run the command until it is done; True if it ever is."""
    site = str(Path(__file__).parent / "site")
    for n in range(RUNS):
        # The disk is full for some runs and then no more: as when somebody makes room.
        lack = {"CHAOS_FULL": str(full), "CHAOS_SEED": f"{name}/{n}"} if full is not None and n < RUNS - 2 else {}
        every = {"PYTHONPATH": os.pathsep.join([site, str(ROOT)]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "jobs.cli", "run", *inline(given)]
        try:
            made = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **every, **env, **lack}, capture_output=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired as e:
            outcome.notes.append(f"no end after {SECONDS:g} s: {(e.stderr or b'')[-400:].decode(errors='replace')}")
            outcome.lost += 1
            return False
        said = made.stderr.decode(errors="replace")
        (place / f"log-{n + 1}.txt").write_text(said)
        if made.returncode == 0:
            return True
        outcome.ended += 1
        if made.returncode != 2 or "Traceback" in said:
            outcome.different += 1
            outcome.notes.append(f"ended with {made.returncode}, not in words: {said[-800:]}")
    outcome.notes.append(f"not done after {RUNS} runs: {said[-400:]}")
    outcome.lost += 1
    return False


def _compare(outcome: Outcome, found: Result, want: Result) -> None:
    odd, unlike = differences(found, want)
    outcome.different += len(unlike)
    outcome.lost += len(want.keys() - found.keys())
    outcome.doubled += len(found.keys() - want.keys())
    outcome.notes += [f"differs: {n}" for n in (*odd, *unlike)[:5]]
