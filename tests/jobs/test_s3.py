"""Source, sink and store on an S3 endpoint over real HTTP: the main job, killed halfway, then the same command."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import conversation, write_jsonl
from tests.faults.test_kill import assert_all_gone, family
from tests.jobs.helpers import command, inline, options, parts, run_job
from tests.s3_server import serve

ROWS = 300
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint():
    with serve() as found:
        yield found


def keys(client, bucket: str, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [o["Key"] for page in pages for o in page.get("Contents", [])]


def seen(url: str, endpoint) -> tuple[int, dict]:
    """Exit status of `curate status`, as on another machine, and the first stage it tells of."""
    process = command("status", [url, "--json"], **endpoint.environment)
    out, err = process.communicate(timeout=60)
    assert out, err
    return process.returncode, json.loads(out)["runs"][0]["stages"][0]


def test_the_main_job_on_s3_survives_a_kill(endpoint, model, tmp_path):
    bucket, client = "curate-test", endpoint.client()
    endpoint.bucket(bucket)
    local = write_jsonl(tmp_path / "corpus" / "a.jsonl", [conversation(i) for i in range(ROWS)])
    client.upload_file(str(local), bucket, "corpus/a.jsonl")
    more = {"cluster.cpus": 2, "cluster.object_store_gb": 0.2}
    remote = options(
        f"s3://{bucket}/corpus/", model, f"s3://{bucket}/out", **more, **{"sink.store": f"s3://{bucket}/store"}
    )

    first = command("run", remote, **endpoint.environment)
    end = time.monotonic() + 240
    while len(keys(client, bucket, "out/scores/parts/")) < 3:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    relatives = family(first.pid)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert_all_gone(relatives)  # until then an actor may still commit what it was at
    done = len(keys(client, bucket, "out/scores/parts/"))
    assert 3 <= done < ROWS // 10
    status, half = seen(f"s3://{bucket}/out", endpoint)
    assert (status, half["stage"], half["done"], half["total"]) == (1, "score", 10 * done, ROWS)
    assert half["rate"] is None or half["rate"] > 0  # parts of one second tell no rate

    again = command("run", remote, **endpoint.environment)
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    assert "rows_done=" in err
    assert f"s3://{bucket}/out/report.html" in out
    status, whole = seen(f"s3://{bucket}/out", endpoint)
    assert (status, whole["done"]) == (0, ROWS)

    run_job("run", inline(options(tmp_path / "corpus", model, tmp_path / "out")))
    root = "out/scores/parts/"
    found = {}
    for key in keys(client, bucket, root):
        body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        found[key.removeprefix(root)] = pq.read_table(io.BytesIO(body))
    expected = parts(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(found[n].equals(expected[n]) for n in expected)
    curated = client.get_object(Bucket=bucket, Key="out/curated/a.jsonl")["Body"].read()
    assert curated == (tmp_path / "out" / "curated" / "a.jsonl").read_bytes()
    leftovers = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert not leftovers
    for key in keys(client, bucket, ""):
        body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert b"testing" not in body.replace(b"curate-test", b""), f"credentials in {key}"


def test_a_missing_bucket_is_an_error_that_names_it(endpoint, model, tmp_path):
    process = command("score", options("s3://no-such-bucket/x/", model, tmp_path / "out"), **endpoint.environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "s3://no-such-bucket/x" in err
    assert "Traceback" not in err
    assert not list(Path(tmp_path).rglob("*.parquet"))
