"""The jobs of a chaos run: what to start, how much of it is committed, and what must come out.

In: a folder and a tiny model. Out: command lines, counts, results that compare, half files. Starts no process but the
undisturbed run of each job, which is inline.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from connectors import storage
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import ROOT, inline, options, run_job
from tests.jobs.sweeping import planted, table
from tests.runtime.fitting import varied
from tests.tiny import save_tiny

WORKERS = 2
TOLERANCE = 1e-6
Result = dict[str, Any]


@dataclass(frozen=True)
class Work(ABC):
    """One job over one corpus; every trial has a place of its own below `root`."""

    root: Path
    model: Path

    name = ""
    actor = "MapWorker"  # how Ray names the actors that do the work
    per_kill = 1  # pieces that a killed actor may have begun in vain

    @property
    def job(self) -> str:
        return self.name

    @abstractmethod
    def given(self, place: Path) -> list[str]:
        """Options of the job; its output and store lie below `place`."""

    @abstractmethod
    def commits(self, place: Path) -> int:
        """Pieces of work that are committed."""

    @abstractmethod
    def result(self, place: Path) -> Result:
        """What the job made, to be compared by `differences`. Numbers are NumPy arrays."""

    def finish(self, place: Path) -> None:  # noqa: B027  # most have nothing
        """What follows on the job, undisturbed."""

    def undisturbed(self) -> tuple[Result, int]:
        """(result, commits) of a run that nobody disturbs, without Ray."""
        place = self.root / "undisturbed" / self.name
        place.mkdir(parents=True, exist_ok=True)
        self._here(self.given(place))
        commits = self.commits(place)
        self.finish(place)
        return self.result(place), commits

    def _here(self, given: list[str]) -> None:
        here(self.job, given)

    def base(self, place: Path, corpus: Path, **more: object) -> list[str]:
        pools = {"cluster.workers": WORKERS, "sink.store": place / "store"}
        return options(corpus, self.model, place / "out", **{**pools, **more})


def here(job: str, given: list[str]) -> None:
    """Run a job in this process, without Ray."""
    run_job(job, inline(given))


def count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern)) if folder.exists() else 0


def parts(folder: Path) -> Result:
    """Parts by name, each as columns. Numbers are arrays, everything else is compared as it is."""
    out: Result = {}
    for path in sorted(folder.rglob("*.parquet")):
        out |= columns(str(path.relative_to(folder)), pq.read_table(path))
    return out


def columns(name: str, found: pa.Table) -> Result:
    out: Result = {}
    for column in found.column_names:
        values = found[column].to_pylist()
        number = values and all(isinstance(v, float) for v in values)
        out[f"{name}:{column}"] = np.array(values) if number else values
    return out


class Score(Work):
    """Scores of 300 rows, of which a compressed stream has a third, and the selection by them."""

    name = "score"

    def given(self, place: Path) -> list[str]:
        corpus = self.root / "corpus" / "score"
        if not corpus.exists():
            write_jsonl(corpus / "a.jsonl", [conversation(i) for i in range(200)])
            rows = "".join(json.dumps(conversation(i)) + "\n" for i in range(200, 300))
            (corpus / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
        return self.base(place, corpus, **{"source.unit_rows": 5})

    def commits(self, place: Path) -> int:
        return count(place / "out" / "scores" / "parts", "*/*.parquet")

    def finish(self, place: Path) -> None:
        here("select", self.given(place))

    def result(self, place: Path) -> Result:
        out = place / "out"
        curated = {f"curated/{p.name}": p.read_bytes() for p in sorted((out / "curated").iterdir())}
        return parts(out / "scores" / "parts") | parts(out / "ledger") | curated


class Generate(Work):
    """The tiny model's own responses to 160 prompts, by the transformers engine."""

    name = "generate"

    def given(self, place: Path) -> list[str]:
        corpus = self.root / "corpus" / "generate"
        if not corpus.exists():
            write_jsonl(corpus / "a.jsonl", [conversation(i) for i in range(160)])
        more = {
            "scorer": "[projection_difference]",
            "source.unit_rows": 4,
            "generation.engine": "transformers",
            "generation.max_new_tokens": 4,
            "cluster.engine_workers": WORKERS,
            "cluster.engine_cpus": 0.7,
        }
        return self.base(place, corpus, **more)

    def commits(self, place: Path) -> int:
        return count(place / "store" / "generations", "*/parts/*/*.parquet")

    def result(self, place: Path) -> Result:
        (made,) = (place / "store" / "generations").iterdir()
        return parts(made / "parts")


class Vllm(Generate):
    """The same by vLLM, whose engine lives in the actor's process: who kills one kills the other."""

    name = "vllm"

    @property
    def job(self) -> str:
        return "generate"

    def given(self, place: Path) -> list[str]:
        settings = {"engine": "vllm", "dtype": "float32", "kv_cache_gb": 0.1, "max_model_len": 128, "max_batch": 8}
        large = self.root / "large"  # vLLM has no kernels for heads as narrow as those of the model of the others
        if not large.exists():
            save_tiny(large, d=256, scale=0.05)
        changed = {f"generation.{name}": value for name, value in settings.items()} | {"model.path": large}
        return [o for o in super().given(place) if o.split("=")[0] not in changed] + [
            f"{name}={value}" for name, value in changed.items()
        ]

    def _here(self, given: list[str]) -> None:
        # vLLM changes the process it is in.
        subprocess.run([sys.executable, "-m", "jobs.cli", self.job, *inline(given)], cwd=ROOT, check=True)


class Fit(Work):
    """EK-FAC factors of 240 rows in 40 shards (two passes: 80 commits), and a test vector."""

    name = "fit"
    actor = "_Member"

    def given(self, place: Path) -> list[str]:
        corpus = self.root / "corpus" / "fit"
        if not corpus.exists():
            write_jsonl(corpus / "a.jsonl", [varied(i) for i in range(240)])
            write_jsonl(corpus.with_name("queries.jsonl"), [{"prompt": "is it?", "response": "yes it is"}])
        more = {
            "scorer": "[influence_function]",
            "query": "file",
            "query.path": corpus.with_name("queries.jsonl"),
            "curvature.shard_rows": 6,
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
        }
        return self.base(place, corpus, **more)

    def commits(self, place: Path) -> int:
        work = place / "store" / "factors"
        return sum(count(work, f"*/work/*/{what}/*.safetensors") for what in ("covariance", "correction"))

    def undisturbed(self) -> tuple[Result, int]:
        result, _ = super().undisturbed()
        return result, 80  # they are gone when the fit ends

    def result(self, place: Path) -> Result:
        found: Result = {}
        for path in sorted((place / "store").rglob("*.safetensors")):
            named = load_file(path)
            # Digests of places are the same in every trial, as they are made of what went in.
            found |= {f"{path.relative_to(place)}:{key}": value for key, value in named.items()}
        return found


class Sweep(Work):
    """Six trainings of a tiny model on what two rankings keep, and what they answer."""

    name = "sweep"
    actor = "_Member"

    @property
    def job(self) -> str:
        return "retrain"

    def given(self, place: Path) -> list[str]:
        place.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {"sweep.seeds": "[0,1]", "sweep.random": 0, "cluster.workers": WORKERS}
        return planted(place, self.model, **more)

    def commits(self, place: Path) -> int:
        return count(place / "store" / "trainings", "*/done.json")

    def result(self, place: Path) -> Result:
        rows = table(place / "out")
        return {arm: np.array([value]) for arm, value in rows.items()}


class Audit(Work):
    """The first audit of a folder of 200 rows; a killed one's lease is taken over."""

    name = "audit"

    def given(self, place: Path) -> list[str]:
        corpus = self.root / "corpus" / "audit"
        if not corpus.exists():
            write_jsonl(corpus / "2026-11-01" / "a.jsonl", [conversation(i) for i in range(200)])
        more = {"source.unit_rows": 5, "audit.lease_seconds": 5, "audit.locked": "wait"}
        return self.base(place, corpus, **more)

    def commits(self, place: Path) -> int:
        return count(place / "out" / "audits", "*/scores/parts/**/*.parquet")

    def result(self, place: Path) -> Result:
        made = place / "out" / "audits"
        if [p.name for p in sorted(made.glob("0*"))] != ["000001"] or not (made / "000001" / "committed.json").exists():
            return {}
        found = pq.read_table(made / "000001" / "statistics.parquet").drop_columns(["label", "as_of"])  # times
        statistics = columns("statistics", found)
        return parts(made / "000001" / "scores" / "parts") | statistics


WORKS: dict[str, type[Work]] = {w.name: w for w in (Score, Generate, Vllm, Fit, Sweep, Audit)}


def differences(found: Result, want: Result) -> tuple[list[str], list[str]]:
    """(missing or too many, different): names."""
    odd = sorted(found.keys() ^ want.keys())
    unlike = []
    for name in found.keys() & want.keys():
        one, other = found[name], want[name]
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            close = one.shape == other.shape and np.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        else:
            close = one == other
        if not close:
            unlike.append(name)
    return odd, sorted(unlike)


def rows_of(place: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(scored rows, rows of the ledger), each (source file, row), as often as they stand there."""

    def found(folder: Path, key: Any) -> list[tuple[str, int]]:
        paths = sorted(folder.rglob("*.parquet"))
        return [(key(p), row) for p in paths for row in pq.read_table(p, columns=["row"])["row"].to_pylist()]

    scored = found(place / "out" / "scores" / "parts", lambda p: p.parent.name)
    return scored, found(place / "out" / "ledger", lambda p: p.stem)


def half_files(place: Path) -> list[str]:
    """Temporary files, and files that have their final name and cannot be read to the end."""
    bad = []
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        try:
            if path.name.endswith(".tmp") or ".probe" in path.name:
                bad.append(str(path))
            elif path.suffix == ".parquet":
                pq.read_table(path)
            elif path.suffix == ".json":
                json.loads(storage.read_text(str(path)))
            elif path.suffix == ".safetensors":
                load_file(path)
        except Exception as e:  # noqa: BLE001  # any: a file that cannot be read is what is looked for
            bad.append(f"{path}: {type(e).__name__}: {e}")
    return bad
