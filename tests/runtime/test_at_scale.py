"""What the driver does with a large corpus: work that grows with the number of units, not with its square."""

from __future__ import annotations

import random
import time

import numpy as np
import pyarrow as pa
import pytest

from curate.corpus.coverage import Covered, Part, check_whole
from curate.corpus.recipe import Recipe
from curate.corpus.units import FileEntry, Manifest, Unit
from curate.runtime.output import Output
from curate.runtime.select import label_counts, load_scores
from curate.selection.select import Rule, decide


def one_file(units: int, rows: int = 4) -> Manifest:
    made = tuple(Unit("a", "/x/a", i * rows, (i + 1) * rows, rows) for i in range(units))
    return Manifest("jsonl", (FileEntry("a", "/x/a", 1, "1", "d", units * rows, ("messages",)),), made)


def seconds_of_the_plan(manifest: Manifest, monkeypatch) -> float:
    """CPU seconds to see what is left of a half-done run, and to check a whole one."""
    parts = {Part(u.key, u.start, u.stop): "" for u in manifest.units}
    half = dict(list(parts.items())[::2])
    monkeypatch.setattr(Output, "parts", lambda self, key=None: half)
    began = time.process_time()
    left = Output("/x").remaining(manifest)
    check_whole([Part(u.key, u.start, u.stop) for u in manifest.units], parts)
    spent = time.process_time() - began
    assert [u.start for u, _ in left] == [u.start for u in manifest.units[1::2]]
    return spent


def test_a_resume_costs_by_unit_and_not_by_unit_squared(monkeypatch):
    small = min(seconds_of_the_plan(one_file(4_000), monkeypatch) for _ in range(3))
    large = min(seconds_of_the_plan(one_file(32_000), monkeypatch) for _ in range(2))
    assert large < 30 * small  # 8 times the units; a square would be 64 times the time


@pytest.mark.parametrize("seed", range(5))
def test_coverage_agrees_with_a_row_by_row_count(seed):
    draw = random.Random(seed)
    done = [(a, a + draw.randint(1, 30)) for a in draw.choices(range(400), k=25)]
    rows = {r for a, b in done for r in range(a, b)}
    covered = Covered(done)
    for _ in range(200):
        start = draw.randint(0, 420)
        stop = start + draw.randint(1, 60)
        found = [r for a, b in covered.gaps(start, stop) for r in range(a, b)]
        assert found == [r for r in range(start, stop) if r not in rows]


@pytest.fixture
def labelled(tmp_path) -> tuple[Output, Manifest, dict[int, tuple[float, str | None, str | None]]]:
    """Parts of two files with labels and groups, some of them missing, one part without any."""
    draw = random.Random(0)
    rows = {"a": 40, "b": 25}
    units = tuple(Unit(k, f"/x/{k}", i, min(i + 10, n), 10) for k, n in rows.items() for i in range(0, n, 10))
    files = tuple(FileEntry(k, f"/x/{k}", 1, "1", k, n, ("messages",)) for k, n in rows.items())
    output, truth = Output(str(tmp_path)), {}
    output.open(Recipe("scores", {"test": 1}))
    for u in units:
        base = 0 if u.key == "a" else rows["a"]
        bare = u.start == 20
        scored = [r for r in range(u.start, u.stop) if draw.random() < 0.8]
        for r in scored:
            label = None if bare else draw.choice(["good", "bad", "ü\u2028", "", None])
            truth[base + r] = (draw.random(), label, draw.choice(["g0", "g1"]))
        mine = [truth[base + r] for r in scored]
        columns = {"id": [str(r) for r in scored], "row": scored, "score": [m[0] for m in mine]}
        words = {"label": [m[1] for m in mine], "group": [m[2] for m in mine]}
        table = pa.table({**columns, **{k: pa.array(v, pa.string()) for k, v in words.items()}})
        output.commit(Part(u.key, u.start, u.stop), table, [])
    return output, Manifest("jsonl", files, units), truth


def test_labels_and_groups_are_those_of_the_parts(labelled):
    output, manifest, truth = labelled
    found = load_scores(output, manifest, ["score"], groups=True, labels=True)
    nothing = (None, None, None)
    assert found.labels.to_pylist() == [truth.get(i, nothing)[1] for i in range(65)]
    assert found.groups.to_pylist() == [truth.get(i, nothing)[2] for i in range(65)]
    assert found.labels.null_count == sum(truth.get(i, nothing)[1] is None for i in range(65))
    mask = np.arange(65) % 2 == 0
    here = [truth[i][1] for i in truth if i % 2 == 0 and truth[i][1] is not None]
    assert label_counts(found.labels, mask) == {w: here.count(w) for w in set(here)}
    by_codes = decide(found.columns["score"], Rule("remove_most", fraction=0.5, per_group=True), found.groups)
    by_texts = decide(
        found.columns["score"], Rule("remove_most", fraction=0.5, per_group=True), found.groups.to_pylist()
    )
    assert (by_codes.keep == by_texts.keep).all()
    assert by_codes.cut == by_texts.cut
