"""A real S3 endpoint for tests: moto's server in a process of its own, spoken to over HTTP on the loopback.

`serve()` starts one and yields an Endpoint. `Endpoint.environment` is what any other process (a worker, a command
under test) needs in order to reach it; `Endpoint.use(monkeypatch)` sets the same in this process.
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.config
import pytest


@dataclass(frozen=True)
class Endpoint:
    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "FSSPEC_S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Point this process and its children here. fsspec reads its variables once, at import: so set both."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": self.url})

    def client(self) -> Any:
        """A boto3 client, an independent way to look at what lies in the store."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def bucket(self, name: str) -> str:
        """Make a bucket; returns its URL."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serve(timeout_s: float = 60.0) -> Iterator[Endpoint]:
    """Start the server, wait until it answers, stop it at the end."""
    port = _free_port()
    command = [sys.executable, str(Path(__file__).with_name("moto_server.py")), "-H", "127.0.0.1", "-p", str(port)]
    # A file, not a pipe: the server writes a line a request, and would stand still once nobody empties the pipe.
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(server, port, timeout_s, log)
            yield Endpoint(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, timeout_s: float, log: BinaryIO) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if server.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"moto's server ended with {server.returncode}: {log.read().decode()[-2000:]}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/moto-api/")
            connection.getresponse().read()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)  # polling a process that is starting, not waiting for a result
        finally:
            connection.close()
