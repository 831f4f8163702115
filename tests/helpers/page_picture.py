# SPDX-License-Identifier: Apache-2.0
"""The picture of the proxy's page in the README: two models on a simulated NPU, after a switch.

npu-sim python tests/helpers/page_picture.py docs/page.png
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from helpers import ROOT
from helpers.browser import Browser
from helpers.models import make_model
from helpers.patience import patience, wait_for
from helpers.server import http_client
from vllm_sleep_ascend.proxy.launch import ports

MODELS = ("tiny-qwen2", "tiny-llama")


class Demo:
    """`make demo-proxy` on other ports; ``said`` is what it prints until both servers have started.

    ``end`` presses Ctrl-C.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.port = ports.free(set())
        self.admin_port = ports.free({self.port})
        self.page = f"http://127.0.0.1:{self.admin_port}/"
        self.users = http_client(f"http://127.0.0.1:{self.port}")
        self.admin = http_client(self.page)
        self.said = work / "said"
        where = ("--port", str(self.port), "--admin-port", str(self.admin_port))
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, ROOT / "examples/demo_proxy.py", work),
                    *(*map(make_model, MODELS), *where),
                ],
                env={**os.environ, "NPU_SIM_MACHINE": f"page-{os.getpid()}"},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def states(self) -> dict[str, str]:
        assert self.process.poll() is None, self.said.read_text()
        with contextlib.suppress(httpx.TransportError):
            servers = self.admin.get("/status").json()["servers"]
            return {server["name"]: server["state"] for server in servers}
        return {}

    def ask(self, model: str) -> None:
        body = {"model": model, "prompt": "The future of AI is", "max_tokens": 8}
        answer = self.users.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text

    def end(self) -> int:
        """A second time, servers get no more time."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60 * patience())


@contextlib.contextmanager
def demo(work: Path) -> Iterator[Demo]:
    """Both models have started; one is awake."""
    running = Demo(work)
    try:
        wait_for(lambda: sorted(running.states().values()) == ["asleep", "awake"], "both", 300)
        yield running
    finally:
        while running.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.end()
        running.users.close()
        running.admin.close()


def take(running: Demo, browser: Browser, file: Path, turn_s: float = 0) -> None:
    """The page after switches there and back, in light colours."""
    browser.prefer("en-US")
    browser.resize(1040, 700)
    browser.open(running.page)
    for model in (*MODELS, *MODELS, MODELS[0]):
        running.ask(model)
        time.sleep(turn_s)
        browser.wait(
            f"[...document.querySelectorAll('#models tr')].some(row => "
            f"row.dataset.state === 'awake' && row.innerText.includes('{model}'))"
        )
    browser.wait("[...document.querySelectorAll('td.queue')].every(e => e.innerText === 'empty')")
    browser.wait("document.querySelectorAll('.card tbody tr').length > 2")
    browser.wait("[...document.querySelectorAll('.last')].every(e => /GB.s/.test(e.innerText))")
    browser.picture(file)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with demo(work) as running, Browser(work) as browser:
            take(running, browser, Path(sys.argv[1]), turn_s=8)  # so that the timeline shows them


if __name__ == "__main__":
    main()
