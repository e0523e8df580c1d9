"""Fits in shards: equal to one in one piece, however they are cut, batched or interrupted; found again; refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curate.curvature.fisher import CurvatureSpec
from curate.errors import ConfigError, CorpusError, CurvatureError, StorageError, WorkerError
from curate.models.tracked import LayerChoice
from curate.runtime import differentiator, partials
from curate.runtime import fit as module
from tests.conftest import write_jsonl
from tests.runtime.fitting import Fitting, assert_equal, solutions, varied

EKFAC = CurvatureSpec(seed=3)


@pytest.fixture
def fitting(tmp_path, tiny) -> Fitting:
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [varied(i) for i in range(25)])
    write_jsonl(tmp_path / "corpus" / "b.jsonl", [varied(i) for i in range(25, 40)])
    return Fitting(tmp_path / "corpus", tiny, tmp_path / "factors")


@pytest.mark.parametrize(
    "spec",
    [EKFAC, replace(EKFAC, fisher="empirical", reduction="sum", tokens="all"), replace(EKFAC, kind="kfac"),
     replace(EKFAC, kind="diagonal", layers=LayerChoice("mlp", stride=2))],
    ids=["ekfac", "empirical", "kfac", "diagonal"],
)  # fmt: skip
def test_shards_give_what_one_piece_gives(fitting, spec, capsys):
    index, done, url = fitting.fit(spec, shard_rows=7, token_budget=200)
    assert (index.rows, done.rows) == (40, 40)
    assert_equal(
        solutions(url, index.layers, spec.kind), solutions(fitting.in_one_piece(spec), index.layers, spec.kind)
    )
    said = capsys.readouterr().err
    assert f"of {index.coverage.total:,} parameters tracked (not: embeddings" in said
    assert "fit: factors: done" in said
    names = {str(p.relative_to(url)) for p in Path(url).rglob("*") if p.is_file()}
    assert {n.split("/")[0] for n in names} <= {"recipe.json", "factors.json", "layers", "inputs"}  # no partial sums


def test_interrupted_anywhere_it_goes_on_there(fitting, monkeypatch, capsys):
    """The n-th file cannot be written, for many n: with each new run the work goes on, and no shard counts twice."""
    real, written = partials.save, []

    def save(url, tensors):
        if len(written) and len(written) % 7 == 0 and written[-1] != "failed":
            written.append("failed")
            raise StorageError(f"no space left for {url}")
        written.append(url)
        real(url, tensors)

    monkeypatch.setattr(partials, "save", save)
    failures, done = 0, None
    while done is None:
        try:
            index, done, url = fitting.fit(EKFAC, shard_rows=8)
        except StorageError:
            failures += 1
    assert failures >= 3
    urls = [u for u in written if u != "failed"]
    assert len(urls) == len(set(urls)) == 5 + 5 + 18  # shards of both passes, 6 + 12 bases: each made once
    assert_equal(solutions(url, index.layers, "ekfac"), solutions(fitting.in_one_piece(EKFAC), index.layers, "ekfac"))
    said = capsys.readouterr().err
    assert "fit: covariance: resuming rows_done=40 rows_left=0" in said
    assert "fit: eigenvectors: resuming matrices_done=" in said


def test_a_sample_that_is_cut_otherwise_takes_nothing_over(fitting, monkeypatch):
    def stop(*args):
        raise StorageError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_index", stop)
        with pytest.raises(StorageError, match="stopped"):
            fitting.fit(EKFAC, shard_rows=8)
    (layer, *_) = sorted((fitting.store).rglob("layers/*.safetensors"))
    layer.write_bytes(b"of other eigenvectors")
    index, _, url = fitting.fit(EKFAC, shard_rows=9)
    assert_equal(solutions(url, index.layers, "ekfac"), solutions(fitting.in_one_piece(EKFAC), index.layers, "ekfac"))


def test_found_again_without_a_model_and_fitted_anew_for_other_settings(fitting, monkeypatch, capsys):
    index, _, url = fitting.fit(replace(EKFAC, examples=9))
    assert index.rows == 9
    others = [replace(EKFAC, examples=9, seed=4), replace(EKFAC, examples=9, layers=LayerChoice(stride=2))]
    assert len({url, *(fitting.fit(o)[2] for o in others)}) == 3
    monkeypatch.setattr(differentiator, "load_model", None)
    left = Path(url) / "work" / "plan" / "covariance" / "00000.safetensors"  # of a run killed at the very end
    left.parent.mkdir(parents=True)
    left.write_bytes(b"sums")
    again, done, there = fitting.fit(replace(EKFAC, examples=9))
    assert (again, done, there) == (index, None, url)
    assert not left.exists()
    assert f"factors: found at {url} rows=9" in capsys.readouterr().err

    body = json.loads((Path(url) / "factors.json").read_text())
    body["model"]["digest"] = "0" * 32
    (Path(url) / "factors.json").write_text(json.dumps(body))
    with pytest.raises(CurvatureError, match=r"the factors in .* are of .*digest 000000000000.*Fit factors for this"):
        fitting.fit(replace(EKFAC, examples=9))


def test_what_cannot_be_fitted_is_said(fitting):
    with pytest.raises(ConfigError, match=r"curvature=identity is H = I: there is nothing to fit"):
        fitting.fit(replace(EKFAC, kind="identity"))
    assert not fitting.store.exists()
    with pytest.raises(ConfigError, match=r"no linear layer matches kind='attention', pattern='experts'.*q_proj"):
        fitting.fit(replace(EKFAC, layers=LayerChoice(pattern="experts")))
    fitting.reader = replace(fitting.reader, max_tokens=8)  # the system prompt alone is longer
    with pytest.raises(CurvatureError, match=r"none of the 40 sampled rows can be used .*curvature\.max_tokens=8"):
        fitting.fit(replace(EKFAC, max_tokens=8))


def test_gradients_that_are_not_finite_name_their_examples(fitting, monkeypatch):
    real = differentiator.load_model

    def poisoned(spec):
        model = real(spec)
        with torch.no_grad():
            model.get_output_embeddings().weight[5] = float("nan")
        return model

    monkeypatch.setattr(differentiator, "load_model", poisoned)
    with pytest.raises(CurvatureError, match=r"gradients of the examples? 'r\d+'.* not finite"):
        fitting.fit(EKFAC)


def test_too_many_bad_rows_end_the_fit_and_a_higher_limit_goes_on(tmp_path, tiny, monkeypatch, capsys):
    rows = [varied(i) for i in range(20)]
    for row in rows[::4]:
        row["messages"] = "no conversation"
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    fitting = Fitting(tmp_path / "corpus", tiny, tmp_path / "factors")
    with pytest.raises(CorpusError, match=r"5 of 20 rows .* more than source\.max_bad_fraction=0\.1 allows"):
        fitting.fit(EKFAC, max_bad_fraction=0.1)
    index, done, _ = fitting.fit(EKFAC, max_bad_fraction=0.25)
    assert (index.rows, done.quarantined) == (15, 5)
    assert "fit: covariance: resuming rows_done=20 rows_left=0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal"])
def test_what_exceeds_the_memory_is_refused_before_the_work(fitting, monkeypatch, kind):
    """q, k, v share A; by hand for q, o [32, 32] and k, v [16, 32] in each of the blocks."""
    spec = replace(EKFAC, kind=kind, layers=LayerChoice(last=1))
    squares = 2 * 32**2 + (32**2 + 16**2 + 16**2 + 32**2)
    need = 4 * ((kind != "diagonal") * squares + (kind != "kfac") * (2 * 32 * 32 + 2 * 16 * 32))
    monkeypatch.setattr(module, "free_bytes", lambda device: need - 1)
    words = rf"takes {need:,} bytes, and cpu has {need - 1:,} free .*curvature\.layers\.kind.*first.*last.*stride"
    with pytest.raises(CurvatureError, match=words):
        fitting.fit(spec)
    assert not list(fitting.store.rglob("*.safetensors"))
    monkeypatch.setattr(module, "free_bytes", lambda device: need)
    assert fitting.fit(spec)[0].rows == 40


def test_a_device_that_is_full_is_said_in_words(fitting, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(module, "accumulate_covariances", full)
    with pytest.raises(
        WorkerError, match=r"out of memory \(CUDA out of memory\).*cluster\.gradient_token_budget .*fits"
    ):
        fitting.fit(EKFAC)
