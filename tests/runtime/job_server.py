"""A job server as Ray's head has one, by its REST interface: it keeps what is submitted and runs nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from aiohttp import web


class JobServer:
    """`jobs` by submission id, as Ray tells of them; `logs` likewise. `drops`: how many times the connection to a log
    is cut after half of it."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.drops = 0
        self.url = ""
        self.clock = 1_000
        self.hidden: set[str] = set()  # ids that the list does not have yet

    def end(self, name: str, status: str) -> None:
        self.jobs[name].update(status=status, end_time=self.clock + 500)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

    async def every(self, request: web.Request) -> web.Response:
        return web.json_response([j for name, j in self.jobs.items() if name not in self.hidden])

    async def one(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return web.json_response(self.jobs[name]) if name in self.jobs else web.Response(status=404, text="no such job")

    async def submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["submission_id"]
        if name in self.jobs:
            self.hidden.discard(name)
            return web.Response(status=500, text=f"Job with submission_id {name} already exists")
        self.clock += 1_000
        told = {"entrypoint": body["entrypoint"], "metadata": body.get("metadata"), "start_time": self.clock}
        self.jobs[name] = {"type": "SUBMISSION", "submission_id": name, "status": "PENDING", **told}
        return web.json_response({"job_id": name, "submission_id": name})

    async def stop(self, request: web.Request) -> web.Response:
        self.end(request.match_info["name"], "STOPPED")
        return web.json_response({"stopped": True})

    async def log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.logs[request.match_info["name"]]})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text = self.logs[request.match_info["name"]]
        if self.drops:
            self.drops -= 1
            await socket.send_str(text[: len(text) // 2])
            assert request.transport is not None
            request.transport.close()
            return socket
        for line in text.splitlines(keepends=True):
            await socket.send_str(line)
        await socket.close()
        return socket


@contextmanager
def serve() -> Iterator[JobServer]:
    """A server on the loopback, in a thread."""
    server = JobServer()
    app = web.Application()
    app.add_routes(
        [
            web.get("/api/version", server.version),
            web.get("/api/jobs/", server.every),
            web.post("/api/jobs/", server.submit),
            web.get("/api/jobs/{name}", server.one),
            web.post("/api/jobs/{name}/stop", server.stop),
            web.get("/api/jobs/{name}/logs", server.log),
            web.get("/api/jobs/{name}/logs/tail", server.tail),
        ]
    )
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def run() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
