"""Headless Chromium over its DevTools protocol, for what only a real browser can tell: layout, media, console."""

from __future__ import annotations

import asyncio
import base64
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def find() -> str | None:
    """The browser's path, or None where there is none."""
    return next((p for p in map(shutil.which, NAMES) if p), None)


# What to do in the page: an expression to evaluate; or a DevTools command with its parameters (a key, a click), which
# may depend on what the steps before it gave.
Command = tuple[str, dict[str, Any]]
Step = str | Command | Callable[[dict[str, Any]], Command]
KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    "Space": 32,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


def key(name: str) -> Command:
    """A key pressed in the page, as a person presses it."""
    text = {"Enter": "\r", "Space": " "}.get(name, "")
    value = " " if name == "Space" else name
    return "Input.dispatchKeyEvent", {
        "type": "keyDown", "key": value, "code": name, "windowsVirtualKeyCode": KEYS[name], "text": text,
    }  # fmt: skip


def mouse(what: str, place: str) -> Callable[[dict[str, Any]], Command]:
    """A mouse event (mouseMoved, mousePressed, mouseReleased) at [x, y], which the step `place` gave."""
    button = {} if what == "mouseMoved" else {"button": "left", "clickCount": 1}
    return lambda out: ("Input.dispatchMouseEvent", {"type": what, "x": out[place][0], "y": out[place][1], **button})


async def _look(page: Path, scripts: Mapping[str, Step], width: int, height: int, features: dict[str, str], media: str,
                picture: Path | None) -> dict[str, Any]:  # fmt: skip
    binary = find()
    assert binary is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = await asyncio.create_subprocess_exec(
            binary, *FLAGS, f"--user-data-dir={profile}", "about:blank", stderr=asyncio.subprocess.PIPE
        )
        assert browser.stderr is not None
        draining = None
        try:
            address = ""
            async with asyncio.timeout(60):
                while "DevTools listening on" not in address:
                    address = (await browser.stderr.readline()).decode()
                    assert address, "the browser ended before it listened"
            draining = asyncio.create_task(browser.stderr.read())  # a full pipe would stop the browser
            port = urlsplit(address.split()[-1]).port
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    target = next(t for t in await answer.json() if t["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    return await _drive(socket, page, scripts, width, height, features, media, picture)
        finally:
            browser.terminate()
            await browser.wait()
            if draining is not None:
                await draining


async def _drive(
    socket: aiohttp.ClientWebSocketResponse,
    page: Path,
    scripts: Mapping[str, Step],
    width: int,
    height: int,
    features: dict[str, str],
    media: str,
    picture: Path | None,
) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    number = 0

    async def call(method: str, **params: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        await socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            events.append(message)

    for domain in ("Page", "Runtime", "Log", "Network"):
        await call(f"{domain}.enable")
    await call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
    )
    await call(
        "Emulation.setEmulatedMedia", media=media, features=[{"name": k, "value": v} for k, v in features.items()]
    )
    await call("Page.navigate", url=page.as_uri())
    while not any(e.get("method") == "Page.loadEventFired" for e in events):
        events.append(await socket.receive_json())
    out: dict[str, Any] = {}
    for name, script in scripts.items():
        if not isinstance(script, str):
            method, params = script(out) if callable(script) else script
            out[name] = await call(method, **params)
            continue
        result = await call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        out[name] = result["result"].get("value")
    if picture is not None:
        if picture.suffix == ".pdf":
            shot = await call("Page.printToPDF", printBackground=False)
        else:
            shot = await call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        picture.write_bytes(base64.b64decode(shot["data"]))
    out["requests"] = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
    out["complaints"] = [
        e["params"]
        for e in events
        if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]
    return out


def look(page: Path, scripts: Mapping[str, Step], width: int = 1280, height: int = 900, dark: bool = False,
         media: str = "", picture: Path | None = None) -> dict[str, Any]:  # fmt: skip
    """Open `page` and take the steps of `scripts` in it, in order; also `requests` (URLs asked for) and `complaints`
    (console, CSP)."""
    features = {"prefers-color-scheme": "dark" if dark else "light"}
    return asyncio.run(_look(page, scripts, width, height, features, media, picture))
