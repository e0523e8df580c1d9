"""The layer-stride study through its job: correlations of scores that runs with fewer blocks really give; resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from curate.errors import ConfigError
from tests.conftest import write_jsonl
from tests.jobs.helpers import options, run_job, scores
from tests.runtime.fitting import varied

ROWS = [varied(i) for i in range(24)]
QUERIES = [
    {"prompt": f"is {i} good?", "positive": f"yes, {i} is the best", "negative": f"no, think about {i + 3} again"}
    for i in range(2)
]


@pytest.fixture
def given(model, tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "queries.jsonl", QUERIES)

    def make(sink: str = "out", **more: object) -> list[str]:
        base = {
            "cluster": "inline",
            "cluster.cpus": 1,
            "cluster.workers": None,
            "scorer": "[influence_function,gradient_product]",
            "scorer.influence_function.behaviours": "[contrast]",
            "query": "file",
            "query.path": tmp_path / "queries.jsonl",
            "sink.store": tmp_path / "store",
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
        }
        return options(tmp_path / "corpus", model, tmp_path / sink, **{**base, **more})

    return make


def test_strides_are_those_of_runs_that_track_fewer_blocks(given, tmp_path, capsys):
    run_job("study", given())
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "layer_stride.json").read_text())
    assert found["rows"] == len(ROWS)
    assert found["blocks"] == [0, 1, 2]
    assert [s["blocks"] for s in found["strides"]] == [[0, 1, 2], [0, 2], [0]]
    page = (tmp_path / "out" / "layer_stride.html").read_text()
    for name in found["names"]:
        assert name in told
        assert name in page.replace("<wbr>", "")
    # What the study says of stride 2, by fitting and scoring again with every second block.
    run_job("score", given("all"))
    run_job("score", given("half", **{"curvature.layers.stride": 2}))
    for q, name in enumerate(found["names"]):
        every, half = scores(tmp_path / "all", name), scores(tmp_path / "half", name)
        want = spearmanr([every[i] for i in sorted(every)], [half[i] for i in sorted(every)]).statistic
        assert found["strides"][1]["correlation"][q] == pytest.approx(want, abs=0.02)


def test_a_second_study_reads_what_the_first_one_wrote(given, tmp_path):
    run_job("study", given())
    (parts,) = (tmp_path / "store" / "studies").iterdir()
    shares = sorted((parts / "shares").iterdir())
    stamps = [p.stat().st_mtime_ns for p in shares]
    first = (tmp_path / "out" / "layer_stride.json").read_text()
    run_job("study", given("again"))
    assert [p.stat().st_mtime_ns for p in shares] == stamps
    assert (tmp_path / "again" / "layer_stride.json").read_text() == first
    run_job("study", given("fewer", **{"study.rows": 8, "study.max_stride": 2}))
    fewer = json.loads((tmp_path / "fewer" / "layer_stride.json").read_text())
    assert fewer["rows"] == 8
    assert len(fewer["strides"]) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scorer": "[random]", "scorer.influence_function.behaviours": None}, "needs influence scores"),
        ({"study.rows": 2}, r"study\.rows is 2"),
        ({"study.level": 1.5}, r"study\.level is 1\.5"),
        ({"study.max_stride": 9}, "from 1 to the 3 tracked blocks"),
    ],
)
def test_a_study_that_cannot_be_is_refused(given, change, told):
    with pytest.raises(ConfigError, match=told):
        run_job("study", given(**change))


def test_the_shares_of_a_shard_are_a_table(given, tmp_path):
    run_job("study", given())
    (file,) = Path(tmp_path / "store" / "studies").rglob("*.parquet")
    table = pq.read_table(file)
    assert table.column_names == ["id", "row", "influence_function.contrast", "gradient_product.test.L2"]
    run_job("score", given())
    for name in table.column_names[2:]:
        want = scores(tmp_path / "out", name)
        for row, shares in zip(table["id"].to_pylist(), table[name].to_pylist(), strict=True):
            assert sum(shares) == pytest.approx(want[row], rel=1e-3, abs=1e-7)
