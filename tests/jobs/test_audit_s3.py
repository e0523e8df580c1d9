"""Audits with source and sink on an S3 endpoint over real HTTP: lease, what is new, retention, days, history."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
import pytest

from connectors import exchange
from curate.errors import LeaseError
from curate.runtime.lease import Lease
from tests.jobs.auditing import arrival, audit
from tests.jobs.test_s3 import keys
from tests.s3_server import serve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("here")]
BUCKET = "curate-audits"


@pytest.fixture(scope="module")
def endpoint():
    with serve() as found:
        yield found


def test_audits_on_s3(endpoint, model, monkeypatch, capsys):
    endpoint.use(monkeypatch)
    endpoint.bucket(BUCKET)
    client = endpoint.client()

    def arrive(name: str, rows: range) -> None:
        body = "".join(json.dumps(arrival(i)) + "\n" for i in rows).encode()
        client.put_object(Bucket=BUCKET, Key=f"arrivals/{name}.jsonl", Body=body)

    place = (f"s3://{BUCKET}/arrivals/", model, f"s3://{BUCKET}/out")
    arrive("2026-11-01", range(20))
    assert audit(*place, capsys)["rows"] == 20
    arrive("2026-11-01", range(26))  # appended to
    arrive("2026-11-02", range(40, 50))
    with Lease(f"{place[2]}/audits/lease.json", 60):
        with pytest.raises(LeaseError, match="another audit is at work"):
            audit(*place)
    assert exchange.read(f"{place[2]}/audits/lease.json") is None
    found = audit(*place, capsys, **{"audit.keep": 1})
    assert (found["rows"], found["grown"]) == (16, 1)
    arrive("2026-11-03", range(50, 60))
    arrive("undated", range(60, 70))  # its day is when it was stored
    days = {"audit.keep": 1, "audit.backfill": ["2026-11-03", "2026-11-03"]}
    assert audit(*place, capsys, **days)["label"] == "2026-11-03"
    assert audit(*place, capsys, **{"audit.keep": 1})["rows"] == 10
    assert audit(*place, capsys)["status"] == "nothing new"

    there = keys(client, BUCKET, "out/audits/")
    scored = {k.split("/")[2] for k in there if "/scores/parts/" in k}
    assert scored == {"000001", "000004"}  # the first, and the newest
    assert sum(k.endswith("committed.json") for k in there) == 4
    body = client.get_object(Bucket=BUCKET, Key="out/audits/history.parquet")["Body"].read()
    assert sorted(r["rows"] for r in pq.read_table(io.BytesIO(body)).to_pylist()) == [10, 10, 16, 20]
