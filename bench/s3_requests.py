"""Requests that a whole job makes of an object store: fixed, by file and by unit, by kind of request.

The job runs in this process (`cluster=inline`) on a tiny corpus in an S3 server of the test kit, three times with other
numbers of files and of units a file; the three counts of each kind of request give its three constants. Where work is
spread over processes each keeps its own connection, but asks for the same.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np

from bench import demo_rows, tiny_model
from bench.common import emit, machine
from bench.stream import vocabulary, write_shards

BENCH = "s3_requests"
BUCKET = "bench"
SHAPES = ((2, 2), (2, 5), (5, 2))  # (files, units a file)


@contextmanager
def server() -> Iterator[str]:
    """moto's S3 server in a thread of this process; yields its URL."""
    from moto.server import ThreadedMotoServer

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    running = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    running.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.stop()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Every request that s3fs makes in this process, by the name of its operation."""
    from aiobotocore.client import AioBaseClient

    seen: Counter[str] = Counter()
    call = AioBaseClient._make_api_call

    async def counting(self: AioBaseClient, operation: str, arguments: dict) -> object:
        seen[operation] += 1
        return await call(self, operation, arguments)

    AioBaseClient._make_api_call = counting
    try:
        yield seen
    finally:
        AioBaseClient._make_api_call = call


def run(work: Path, files: int, units: int, unit_rows: int) -> Counter[str]:
    """One job over files × units × unit_rows rows; its requests."""
    import boto3

    from curate.concepts import concept as concept_files
    from curate.models.load import ModelSpec
    from jobs.app import compose_config
    from jobs.app import run as run_job
    from jobs.run import stages

    name = f"{files}-{units}"
    write_shards(work / name, files * units * unit_rows, files, 0)
    client = boto3.client("s3", endpoint_url=os.environ["FSSPEC_S3_ENDPOINT_URL"], region_name="us-east-1")
    for path in sorted((work / name).iterdir()):
        client.upload_file(str(path), BUCKET, f"{name}/corpus/{path.name}")
    path = work / "model"
    if not path.exists():
        tiny_model.save(path, vocabulary())
        model = ModelSpec(str(path), dtype="float32", device="cpu")
        concept_files.save(demo_rows.random_concept(model, 1, 0)[0], str(work / "concept"))
    options = [
        "source=files", f"source.url=s3://{BUCKET}/{name}/corpus/", f"source.unit_rows={unit_rows}", "model=hf",
        f"model.path={path}", "concept=[file]", f"concept.file.path={work / 'concept'}",
        "scorer=[vector_filter,response_length]", f"sink.url=s3://{BUCKET}/{name}/out", f"sink.store={work / 'store'}",
        "cluster=inline", "cluster.cpus=1",
    ]  # fmt: skip
    with counted() as seen, redirect_stdout(sys.stderr):
        run_job(compose_config("run", options), stages)
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench.s3_requests", description=__doc__)
    p.add_argument("--unit-rows", type=int, default=16)
    args = p.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="curate-bench-") as temp, server() as url:
        os.environ |= {
            "FSSPEC_S3_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        import boto3
        import fsspec.config

        fsspec.config.conf["s3"] = {"endpoint_url": url}  # fsspec reads its variables at import
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        counts = [run(Path(temp), *shape, args.unit_rows) for shape in SHAPES]
    # count = fixed + by file × files + by unit × files × units a file
    left = np.array([[1, f, f * u] for f, u in SHAPES], dtype=float)
    settings = {**vars(args), **machine(), "shapes": SHAPES}
    for name in sorted(set().union(*counts)):
        found = np.linalg.solve(left, np.array([c[name] for c in counts], dtype=float))
        values = dict(zip(("fixed", "by_file", "by_unit"), (round(float(x), 3) for x in found), strict=True))
        emit(BENCH, name, values, "requests", settings={**settings, "counts": [c[name] for c in counts]})


if __name__ == "__main__":
    main()
