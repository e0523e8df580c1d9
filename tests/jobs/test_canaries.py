"""No secret in anything that a job writes or says: canaries in the environment, on S3, in options that are refused."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from curate.errors import CurateError
from jobs.submit import prepared
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import command, inline, options, run_job
from tests.s3_server import serve

CANARY = "canary0f5e"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws+secret/x",
    "AWS_SESSION_TOKEN": f"{CANARY}-session",
    "HF_TOKEN": f"hf_{CANARY}",
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "WANDB_API_KEY": f"{CANARY}-wandb",
    "DATABASE_URL": f"postgres://user:{CANARY}@host/db",
    "https_proxy": "",
}


@pytest.fixture
def planted(monkeypatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def texts(name: str, body: bytes) -> Iterator[str]:
    """All that a file says; compressed tables are opened."""
    yield body.decode("utf-8", "replace")
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(body))
        yield repr(table.schema.metadata) + repr(table.to_pylist())


def assert_clean(files: dict[str, bytes], *said: str) -> None:
    assert len(files) > 3
    for name, body in files.items():
        assert CANARY not in name
        assert not [t for t in texts(name, body) if CANARY in t], name
    assert not [t for t in said if CANARY in t]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_whole_job_on_s3(planted, model, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG, logger="curate")
    monkeypatch.setenv("CURATE_LOG", "json")
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
    rows = [conversation(i) for i in range(30)]
    rows[3] = {**rows[3], "messages": []}  # a bad row, for the quarantine
    with serve() as endpoint:
        endpoint.use(monkeypatch)
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)  # the server asks for no particular key
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        bucket, client = "canary-free", endpoint.client()
        endpoint.bucket(bucket)
        local = write_jsonl(tmp_path / "a.jsonl", rows)
        client.upload_file(str(local), bucket, "corpus/a.jsonl")
        more = {
            "sink.store": f"s3://{bucket}/store",
            "scorer": "[vector_filter,random]",
            "source.max_bad_fraction": 0.5,
        }
        given = inline(options(f"s3://{bucket}/corpus/", model, f"s3://{bucket}/out", **more))
        run_job("run", given)
        with pytest.raises(CurateError) as e:
            run_job("run", [*given, "source.url=s3://no-such-canary-bucket/x"])
        found = client.list_objects_v2(Bucket=bucket)["Contents"]
        made = {o["Key"]: client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in found}
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert {"out/report.html", "out/summary.json", "out/scores/recipe.json"} <= set(made)
    assert any("quarantine" in k for k in made)
    out, err = capfd.readouterr()
    assert '"event"' in err or "score" in err
    assert_clean(made | files_below(tmp_path / "cache"), str(e.value), caplog.text, out, err)


@pytest.mark.slow
def test_workers_and_their_logs(planted, corpus, model, tmp_path):
    place = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))  # a socket's path has little room
    try:
        given = options(corpus, model, tmp_path / "out", **{"cluster.cpus": 2, "cluster.object_store_gb": 0.2})
        process = command(
            "score", given, **ENVIRONMENT, CURATE_LOG="json", CURATE_WORKER_LOGS="1", RAY_TMPDIR=str(place)
        )
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        logs = {n: b for n, b in files_below(place).items() if b}
        assert any("worker" in n for n in logs)
        assert_clean(files_below(tmp_path / "out") | logs, out, err)
    finally:
        shutil.rmtree(place, ignore_errors=True)


SECRETIVE = f"AKIA{CANARY}:se/{CANARY}@"


@pytest.mark.parametrize(
    "option",
    [
        f"source.url=s3://{SECRETIVE}bucket/x",
        f"source.url=[s3://bucket/y,s3://{SECRETIVE}bucket/x]",
        f'"source.url=s3://bucket/x.jsonl?X-Amz-Signature={CANARY}"',
        f'"source.url=https://host/x.jsonl?token={CANARY}"',
        f"sink.url=s3://{SECRETIVE}bucket/x",
        f"sink.url=https://{SECRETIVE}host/x",
        f"sink.store=s3://{SECRETIVE}bucket/store",
        f"sink.scores=s3://{SECRETIVE}bucket/scores",
        f"model.path=https://{SECRETIVE}host/model",
        f"model.adapter=s3://{SECRETIVE}host/adapter",
        f"concept.file.path=s3://{SECRETIVE}bucket/concept",
        f"+judge.api_key={CANARY}",
        f"judge.apikey={CANARY}",
    ],
)
def test_a_secret_where_none_belongs_is_refused_and_not_repeated(option, corpus, model, tmp_path, capfd, here):
    given = [*options(corpus, model, tmp_path / "out"), option.strip('"') if "?" not in option else _quoted(option)]
    with pytest.raises(CurateError) as e:
        run_job("run", given)
    assert CANARY not in str(e.value)
    out, err = capfd.readouterr()
    assert CANARY not in out + err
    for name, body in files_below(tmp_path).items():
        if "corpus" not in name:
            assert CANARY.encode() not in body, name


def _quoted(option: str) -> str:
    name, value = option.strip('"').split("=", 1)
    return f'{name}="{value}"'


def test_a_submitted_job_carries_options_and_no_environment(planted, monkeypatch):
    monkeypatch.setenv("CURATE_STORE", "s3://bucket/store")
    where = ["source=files", "source.url=s3://bucket/x", "sink.url=s3://bucket/out"]
    name, given = prepared("run", where, shipped=False)
    assert CANARY not in name + json.dumps(given)
    assert [o for o in given if o not in where] == ["sink.store=s3://bucket/store"]
    assert os.environ["HF_TOKEN"].endswith(CANARY)
