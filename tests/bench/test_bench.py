"""The benchmarks' output and arithmetic, on a tiny model; what they measure of real ones is no test."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench import demo_rows, stream, vector_filter
from bench.common import MemorySampler, emit, series
from tests.tiny import save_tiny, tiny_model

KEYS = ["bench", "metric", "value", "unit", "ratio", "against", "settings"]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_figure_is_one_line_of_json(capsys):
    emit("b", "rate", 2.0, "rows/s", 0.5, "loop", {"rows": 3})
    emit("b", "memory", {"start": 1.0, "end": 1.23456789}, "GiB")
    first, second = lines(capsys)
    assert list(first) == list(second) == KEYS
    assert first["value"] == 2.0
    assert (first["ratio"], first["against"], first["settings"]) == (0.5, "loop", {"rows": 3})
    assert second["value"] == {"start": 1.0, "end": 1.23457}
    assert (second["ratio"], second["against"], second["settings"]) == (None, None, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"end": float("nan")}])
def test_what_is_no_number_is_not_printed(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        emit("b", "rate", value, "rows/s")


def test_a_series_shows_the_quartiles_of_time():
    points = [(float(t), float(t)) for t in range(0, 401)] + [(150.0, 1000.0)]
    found = series(points, 100, 300)
    assert found == {"start": 102.5, "q1": 150.5, "q2": 200.0, "q3": 250.0, "end": 297.5, "max": 1000.0}


def test_a_series_without_points_says_why():
    with pytest.raises(ValueError, match="too short"):
        series([(1.0, 1.0)], 2, 3)


def test_memory_is_that_of_this_process_and_its_children():
    # The child speaks once its 64 MiB are touched, and lives until its stdin closes.
    code = "import sys; x = b'x' * 2**26; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        with MemorySampler(lambda p: "mine" if p.pid == child.pid else "other") as memory:
            pass
        child.communicate()
    assert memory.samples
    assert memory.samples[0].rss["mine"] > 2**26
    assert memory.samples[0].rss["driver"] >= memory.samples[0].private["driver"] > 0


def test_rows_are_taken_from_all_of_the_corpus():
    rows = [{"id": i} for i in range(10)]
    assert [r["id"] for r in demo_rows.spread(rows, 4)] == [0, 2, 5, 7]
    assert [r["id"] for r in demo_rows.spread(rows, 12)] == [*range(10), 0, 1]


def test_matmul_peak_is_positive_and_finite():
    assert 0 < vector_filter.matmul_peak(tiny_model(), 2, [8, 16]) < 1e15


@pytest.mark.parametrize("pad", [0, 700])
def test_vector_filter_measures_both_sides_and_finds_one_score(tmp_path, capsys, one_thread, pad):
    path = save_tiny(tmp_path / "model")
    vector_filter.main(["--model", str(path), "--rows", "3", "--repetitions", "2", "--pad-to", str(pad)])
    found = {line["metric"]: line for line in lines(capsys)}
    assert {line["bench"] for line in found.values()} == {"vector_filter"}
    ours, usual = found["rows_per_second"], found["usual_rows_per_second"]
    assert ours["value"] > 0
    assert ours["against"] == "usual loop"
    assert ours["ratio"] == pytest.approx(ours["value"] / usual["value"], rel=1e-3)
    assert found["largest_absolute_difference"]["value"] < 1e-4
    assert 0 < found["arithmetic"]["ratio"] < 1
    assert found["padded_tokens"]["ratio"] >= 1
    assert ours["settings"]["layer"] == 1


def test_stream_writes_the_rows_it_says(tmp_path):
    import pyarrow.dataset

    stream.write_shards(tmp_path / "a", 103, 5, seed=1)
    stream.write_shards(tmp_path / "b", 103, 5, seed=1)
    one, two = (pyarrow.dataset.dataset(tmp_path / n).to_table() for n in "ab")
    assert len(list((tmp_path / "a").iterdir())) == 5
    assert len(set(one["id"].to_pylist())) == one.num_rows == 103
    assert one.equals(two)
