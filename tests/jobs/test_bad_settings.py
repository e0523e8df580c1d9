"""Bad settings and bad places, through the real jobs: one sentence with the remedy, status 2, nothing half-written."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from curate.errors import ConceptError, ConfigError, StorageError
from tests.conftest import conversation, write_jsonl
from tests.jobs.bad_input import (
    assert_nothing_half_written,
    assert_only_bad_rows_are_lost,
    chat,
    contents,
    quarantine,
    said,
    save_concept,
    stamps,
)
from tests.jobs.helpers import command, options, run_job
from tests.tiny import save_tiny


@pytest.mark.usefixtures("here")
def test_a_wrong_layer(corpus, model, tmp_path):
    sink = tmp_path / "out"
    for change, kind, message in [
        ({"concept.file.layer": 99}, ConceptError, r"'test' has no direction at layer 99: its layers are 0 to 3.*0-3"),
        ({"concept.file.layer": -1}, ConceptError, r"no direction at layer -1: its layers are 0 to 3"),
        ({"scorer.vector_filter.layers": "[2,7]"}, ConceptError, r"no direction at layer 7: its layers are 0 to 3"),
        ({"scorer.vector_filter.layers": "[-2]"}, ConfigError, r"vector_filter\.layers holds -2; a layer is a whole"),
        ({"scorer": "[activation_norm]", "scorer.activation_norm.layers": "[9]"}, ConfigError, r"layer 9 .*0 to 3"),
    ]:
        with pytest.raises(kind, match=message):
            run_job("score", options(corpus, model, sink, **change))
    assert not (sink / "scores").exists()


@pytest.mark.usefixtures("here")
def test_a_concept_of_another_width_or_model(corpus, model, tmp_path):
    sink = tmp_path / "out"
    wide = save_concept(tmp_path / "wide", model, 0, width=48)
    with pytest.raises(ConceptError, match=r"'test' has width 48, the model .* has 32.*make it again"):
        run_job("score", options(corpus, model, sink, **{"concept.file.path": wide}))
    other = save_tiny(tmp_path / "other", layers=3, seed=5)
    foreign = save_concept(tmp_path / "foreign", other, 0)
    with pytest.raises(ConceptError, match=r"made from .*but the model to score with is .*allow_other_model=true"):
        run_job("score", options(corpus, model, sink, **{"concept.file.path": foreign}))
    deep = save_concept(tmp_path / "deep", save_tiny(tmp_path / "deeper", layers=5), 0)
    with pytest.raises(ConceptError, match=r"6 rows, made for a model of 5 layers; .* has 3 layers"):
        run_job("score", options(corpus, model, sink, **{"concept.file.path": deep}))
    with pytest.raises(StorageError, match=r"nowhere\.json: it does not exist; check the spelling"):
        run_job("score", options(corpus, model, sink, **{"concept.file.path": tmp_path / "nowhere"}))
    (tmp_path / "wide.safetensors").write_bytes((tmp_path / "wide.safetensors").read_bytes()[:100])
    with pytest.raises(ConceptError, match=r"wide\.json or \.safetensors is broken"):
        run_job("score", options(corpus, model, sink, **{"concept.file.path": wide}))
    assert not (sink / "scores").exists()


@pytest.mark.usefixtures("here")
def test_unknown_options_name_the_near_ones(corpus, model, tmp_path, monkeypatch, capsys):
    sink = tmp_path / "out"
    given = options(corpus, model, sink)
    for arguments, expected in [
        (["rum"], "there is no job 'rum'; did you mean 'run'?"),
        (["run", *given, "selector.frction=0.5"], "no option 'selector.frction'; did you mean selector.fraction"),
        (["run", *given, "sink.urll=x"], "no option 'sink.urll'; did you mean sink.url"),
        (["run", *given, "scorer.vector_filter.layer=2"], "did you mean scorer.vector_filter.layers"),
        (["run", *given, "selektor=keep_most"], "no option 'selektor'; did you mean selector"),
        (["run", *given, "source=fils"], "there is no source 'fils'; did you mean 'files'?"),
        (["run", *given, "scorer=[vektor_filter]"], "no scorer 'vektor_filter'; did you mean 'vector_filter'?"),
        (["run", *given, "selector=remove_mots"], "there is no selector 'remove_mots'; did you mean 'remove_most'"),
        (["run", *given, "selector.mode=remove_all"], "selector.mode = 'remove_all'"),
        (["run", *given, "selector.fraction=lots"], "selector.fraction"),
        (["run", *given, "selector.fraction=2"], "selector.fraction is 2.0; it must lie between 0 and 1"),
        (["run", *given, "selector.fraction=0.1", "selector.count=5"], "set exactly one of selector.fraction, sel"),
        (["run", *given, "source.format=parket"], "source.format='parket' is unknown; did you mean 'parquet'?"),
        (["run", *given, "source.max_tokens=many"], "source.max_tokens"),
        (["run", *given, "+nonsense=1"], "nonsense: there is no such option"),
        (["run", *given, "source"], "Options are name=value"),
        (["run", "source=files", f"sink.url={sink}"], "source.url is not set; give it on the command line"),
        (["run", *given, "sink.url=s33://x/out"], "unknown scheme 's33'; did you mean 's3'"),
        (["run", f"--config-dir={tmp_path}", *given, "selector.fraction=2"], "selector.fraction is 2.0; it must lie"),
    ]:  # fmt: skip
        assert expected in said(capsys, monkeypatch, *arguments), arguments[-1]
    assert contents(sink) == {}
    # Hydra's own flags (--config-dir above) must not switch off what the library has to say.
    assert not logging.getLogger("curate.models.engines").disabled


# ---- the output place ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no right to mount a file system here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.usefixtures("here")
def test_unwritable_output(corpus, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    sink = tmp_path / "file" / "out"
    err = said(capsys, monkeypatch, "run", *options(corpus, model, sink))
    assert f"cannot write {sink}: a part of the path is a file, not a folder; choose another place" in err
    # The kernel's own file system: nobody may make a folder there, root included.
    err = said(capsys, monkeypatch, "run", *options(corpus, model, "/sys/curate-test"))
    assert "cannot write /sys/curate-test: " in err
    assert "permission denied" in err or "read-only" in err
    # The store is used when a concept is made: refused before the work, not after it.
    trait = Path(__file__).parents[2] / "curate" / "embedded" / "sycophantic.json"
    made = {"concept": "[persona]", "concept.file.path": None, "concept.persona.path": trait}
    job = options(corpus, model, tmp_path / "out", **made, **{"sink.store": "/sys/curate-store"})
    err = said(capsys, monkeypatch, "concept", *job)
    assert "cannot write /sys/curate-store/concepts: " in err
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("here")
def test_a_read_only_disk(corpus, model, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    sink = small_disk / "out"
    with pytest.raises(StorageError, match=rf"cannot write {sink}: the file system is read-only; choose a place that"):
        run_job("score", options(corpus, model, sink))


@pytest.mark.usefixtures("here")
def test_no_space_left(corpus, model, small_disk):
    before, sink = contents(corpus), small_disk / "out"
    big = [
        r | {"messages": [*r["messages"], {"role": "user", "content": "x" * 400}]} for r in map(conversation, range(60))
    ]
    write_jsonl(corpus / "a.jsonl", big)
    before = contents(corpus)
    job = options(corpus, model, sink, **{"cluster.workers": 1, "source.unit_rows": 4})

    # While scoring: the parts that were committed stay, the next one leaves nothing.
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(80 << 10))
    with pytest.raises(StorageError, match=r"cannot write .*/scores/.*: no space left; free some space there"):
        run_job("run", job)
    assert contents(corpus) == before
    assert_nothing_half_written(small_disk)
    done = stamps(sink / "scores")
    assert 0 < len(done) < 25

    # With more space the same command goes on; then the curated shards do not fit.
    subprocess.run(["mount", "-o", "remount,size=256k", small_disk], check=True)
    run_job("score", job)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    with (small_disk / "ballast").open("ab") as f:
        stat = shutil.disk_usage(small_disk)
        f.write(bytes(max(0, stat.free - (24 << 10))))
    with pytest.raises(StorageError, match=r"cannot write .*/curated/a\.jsonl: no space left; free some space there"):
        run_job("select", job)
    assert_nothing_half_written(small_disk)
    assert not (sink / "curated" / "a.jsonl").exists()
    assert not (sink / "ledger" / "a.jsonl.parquet").exists()
    ballast.unlink()
    run_job("select", job)
    lines = {k: (corpus / k).read_bytes().splitlines() for k in ("a.jsonl", "b.jsonl")}
    assert_only_bad_rows_are_lost(sink, lines, {})
    assert contents(corpus) == before


# ---- as a person meets it ----


@pytest.mark.usefixtures("here")
def test_a_process_of_its_own_ends_with_status_2_and_one_message(corpus, model, tmp_path):
    """An error within a worker, which Ray wraps several times over, and one before Ray is started."""
    for path in corpus.iterdir():
        path.write_bytes(b"".join(json.dumps(chat(("user", "hello?"))).encode() + b"\n" for _ in range(12)))
    late = command("score", options(corpus, model, tmp_path / "late", **{"cluster.cpus": 2, "cluster.workers": 1}))
    early = command("score", options(tmp_path / "corpse", model, tmp_path / "early"))
    for process, expected in [(early, "no such file or folder; did you mean 'corpus'?"), (late, "rows are bad, more")]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2, err
        [message] = [line for line in err.splitlines() if line.startswith("curate score: ")]
        assert expected in message
        assert "Traceback" not in err + out
    assert not (tmp_path / "early").exists()
    assert_nothing_half_written(tmp_path / "late")
    assert quarantine(tmp_path / "late")
