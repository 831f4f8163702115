# SPDX-License-Identifier: Apache-2.0
"""A real browser: Debian's Chromium without a window, driven by its DevTools protocol."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx

from helpers.patience import patience, wait_for

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = "there is no Chromium on this machine; apt-get install chromium"

ELSEWHERE = "elsewhere.example"
"""A name that this browser looks up as this machine."""

_OPTIONS = (
    *("--headless=new", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-port=0"),
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1, MAP * ~NOTFOUND, "
    "EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


class Browser:
    """One tab; a context manager.

    ``complaints`` are errors that the page has logged or not caught, and ``answers`` the codes of
    all answers, also of those that pages may not see.
    """

    def __init__(self, folder: Path) -> None:
        from websockets.sync.client import connect  # which few tests need

        assert PROGRAM is not None, MISSING
        as_root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        self.complaints: list[str] = []
        self.answers: list[int] = []
        self._open = contextlib.ExitStack()
        self._numbers = itertools.count(1)
        self._log = open(folder / "browser.log", "wb")  # noqa: SIM115
        self._process = subprocess.Popen(
            [PROGRAM, *_OPTIONS, *as_root, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            port = folder / "profile" / "DevToolsActivePort"
            wait_for(lambda: port.exists() and port.read_text().count("\n"), "the browser", 30)
            address = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
            (tab,) = (t for t in httpx.get(address, trust_env=False).json() if t["type"] == "page")
            opening = connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None)
            self._socket = self._open.enter_context(opening)
        except BaseException:
            self._end()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.do("Browser.close")
        self._end()

    def _end(self) -> None:
        self._open.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        self._log.close()

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A call of the DevTools protocol."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30 * patience()))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Network.responseReceivedExtraInfo":
            self.answers.append(message["params"]["statusCode"])
        elif message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            if entry["level"] == "error":
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise's, once it has one."""
        done = self.do(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, (expression, done["exceptionDetails"])
        return done["result"].get("value")

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until an expression is true in the page."""

        def holds() -> bool:
            with contextlib.suppress(AssertionError):  # the page that was there before
                return bool(self.js(condition))
            return False

        wait_for(holds, condition, seconds)

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element, which nothing else may cover."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        place = self.js(
            f"(() => {{ const e = {found}, r = e.getBoundingClientRect();"
            "const x = r.x + r.width / 2, y = r.y + r.height / 2;"
            "return e.contains(document.elementFromPoint(x, y)) ? {x, y} : null; })()"
        )
        assert place is not None, f"{selector} is covered or not shown"
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def write(self, text: str) -> None:
        self.do("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.do("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.do("Input.dispatchKeyEvent", type="keyUp", **named)

    def prefer(self, language: str) -> None:
        agent = self.js("navigator.userAgent")
        self.do("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Of the whole page."""
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**size, "scale": 1}
        data = self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))
