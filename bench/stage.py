"""The score stage as a benchmark runs it: a corpus in, parts out, and when each part was committed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from connectors import storage
from curate.concepts.concept import Concept
from curate.corpus.example import ColumnMap
from curate.corpus.recipe import Recipe
from curate.models.load import ModelSpec
from curate.runtime.cluster import ClusterSpec
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec
from curate.runtime.score import ScoreSpec, score
from curate.runtime.session import session
from curate.runtime.stage import StageResult


@dataclass(frozen=True)
class StageRun:
    """`commits`: (time.time(), rows) of each part, in order of time. Wall seconds: `whole` with the start and the end
    of Ray, `manifest` of scanning the files."""

    result: StageResult
    commits: list[tuple[float, int]]
    manifest: float
    whole: float
    workers: int
    worker_cpus: float

    @property
    def steady_rows_per_second(self) -> float:
        """Rows after the first part, over the time from its commit to the last one.

        Raises:
            ValueError: there is one part only.
        """
        if len(self.commits) < 2:
            raise ValueError("one part only, so no steady state; give it more rows, or make units smaller")
        return sum(rows for _, rows in self.commits[1:]) / (self.commits[-1][0] - self.commits[0][0])


def run_stage(
    url: str,
    output: str,
    model: ModelSpec,
    concept: Concept,
    cluster: ClusterSpec,
    unit_rows: int,
    max_tokens: int,
) -> StageRun:
    """Score every row below `url` by the concept's vector filter, on a Ray of its own. `output` is a new local folder.

    Raises:
        CorpusError: a row is bad: what is measured must be work.
    """
    began = time.perf_counter()
    with session(cluster) as running:
        scanning = time.perf_counter()
        manifest, _, columns = build_manifest(SourceSpec(url, "auto", ColumnMap(), unit_rows, False), None)
        scanned = time.perf_counter() - scanning
        reader = ReaderSpec(manifest.format, columns, model, max_tokens, "quarantine")
        spec = ScoreSpec(reader, {"vector_filter": {}}, Output(output), running.token_budget)
        result = score(spec, Recipe("scores", {"bench": output}), manifest, [concept], running, 0.0)
        pool = running.scorers
    whole = time.perf_counter() - began
    commits = sorted(
        (storage.local_path(place).stat().st_mtime, part.stop - part.start)
        for part, place in Output(output).parts().items()
    )
    return StageRun(result, commits, scanned, whole, pool.size, pool.cpus)
