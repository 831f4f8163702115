# SPDX-License-Identifier: Apache-2.0
"""A small server with vLLM's routes that a proxy needs, for tests of processes: it starts at once.

It writes what happens to it into a journal, a line for each event.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote

MIB = 1 << 20
TOTAL, WEIGHTS, KV_CACHE = 1024 * MIB, 300 * MIB, 148 * MIB
"""Bytes of the device, of which all stand-ins in one folder say that they use it, and of the tags
of one whose command does not say what it takes."""


class State:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.asleep: set[str] = set()
        self.background: Path | None = None
        """Once it is there, the background response has ended."""
        self.level = 0
        """At which the weights sleep; 2 until they are loaded."""
        self.place = "host"
        self.last: dict | None = None
        share = int(TOTAL * args.gpu_memory_utilization) or WEIGHTS + KV_CACHE
        weights = min(WEIGHTS, share)
        self.sizes = {"weights": weights, "kv_cache": share - weights}
        """Bytes of its tags."""
        self.device = Path(args.journal).parent / "device"
        """A file for each stand-in, with the bytes that it holds."""
        self.hold()

    def here(self) -> dict[str, int]:
        """Bytes of its tags that are on the device."""
        return {tag: 0 if tag in self.asleep else size for tag, size in self.sizes.items()}

    def hold(self, size: int | None = None) -> None:
        """Bytes of the device; by default those of what is awake."""
        if self.args.reports_memory:
            self.device.mkdir(exist_ok=True)
            file = self.device / quote(self.args.model, safe="")
            file.write_text(str(sum(self.here().values()) if size is None else size))

    def sleep(self, level: int, place: str) -> None:
        if self.background is not None:
            self.note("waits before it sleeps")
            wait_for(self.background)
        if self.asleep and not self.args.reports_memory:
            return  # as stock vLLM does
        self.asleep, self.level = {"weights", "kv_cache"}, max(self.level, level)
        self.place = place
        self.last = copied(f"sleep level {level}", self.sizes["weights"] if level == 1 else 0)
        self.hold()
        to = " to disk" if place == "disk" else ""
        self.note(f"sleeps{to}" if level == 1 else f"sleeps at level {level}")

    def wake(self, tags: list[str]) -> None:
        self.last = copied("wake", self.sizes["weights"] if self.level == 1 else 0)
        self.asleep -= set(tags or self.asleep)
        self.hold()
        if not self.asleep:
            self.level = 0
            self.note("wakes")

    def rank(self) -> dict:
        """Of /sleep_status, with what the proxy reads."""
        here = self.here()
        sizes = {"offloaded": int(self.level == 1), "discarded": int(self.level == 2)}
        backup = self.sizes["weights"] * sizes["offloaded"]
        host, disk = (backup if self.place == place else 0 for place in ("host", "disk"))
        return {
            "rank": 0,
            "device": 0,
            "total": TOTAL,
            "free": TOTAL - sum(int(file.read_text()) for file in self.device.glob("*")),
            "held": sum(here.values()),
            "share": sum(self.sizes.values()),
            "enabled": True,
            "tags": {
                "weights": {**sizes, "device": here["weights"], "host": host, "disk": disk},
                "kv_cache": {"device": here["kv_cache"], "host": 0, "disk": 0},
            },
            "weights": {"source": "checkpoint", "version": "0"},
            "last_operation": self.last,
        }

    def note(self, event: str) -> None:
        with open(self.args.journal, "a") as journal:
            journal.write(f"{self.args.model} {event}\n")


def copied(operation: str, size: int) -> dict:
    return {"operation": operation, "copied_bytes": size, "seconds": 0.1}


class Handler(BaseHTTPRequestHandler):
    state: State
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        state = self.state
        if path == "/v1/models":
            names = (state.args.model, *state.args.alias)
            self._answer({"data": [{"id": name} for name in names]})
        elif path == "/is_sleeping" and not state.args.without_sleep:
            self._answer({"is_sleeping": bool(state.asleep)})
        elif path == "/sleep_status" and state.args.reports_memory:
            self._answer({"state": "", "ranks": [state.rank()]})
        elif path == "/health":
            if "authorization" in self.headers:
                state.note("is asked for its health with a key")
            self._answer({})
        elif path == "/v1/responses/r" and state.background is not None:
            ended = state.background.exists()
            self._answer({"id": "r", "status": "completed" if ended else "in_progress"})
        elif path == "/v1/responses/stored":
            state.note("streams")
            self._answer({"id": "stored"}, until=Path(parse_qs(query)["until"][0]))
        else:
            self._answer({}, 404)

    def do_POST(self) -> None:
        path, _, query = self.path.partition("?")
        state, options = self.state, parse_qs(query)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        allows = state.args.fails_sleep_until
        if path == "/sleep" and allows and not Path(allows).exists():
            state.note("does not sleep")
            self._answer({}, 500)
        elif path == "/sleep":
            state.sleep(int(options["level"][0]), options.get("to", ["host"])[0])
            self._answer({})
        elif path == "/wake_up":
            state.wake(options.get("tags", []))
            self._answer({})
        elif path == "/reload_weights":
            state.note("loads its weights")
            self._answer({})
        elif path == "/reset_prefix_cache":
            self._answer({"success": True})
        elif path == "/v1/completions":
            prompt = json.loads(body)["prompt"]
            if state.asleep:
                self._answer({"error": {"message": "it sleeps"}}, 500)
            elif prompt == "die":
                state.note("dies")
                os.kill(os.getpid(), signal.SIGKILL)
            elif prompt == "become another program":
                state.note("listens no longer")
                os.execvp("sleep", ["sleep", "600"])
            else:
                if prompt.startswith("until "):
                    wait_for(Path(prompt.removeprefix("until ")))
                self._answer({"model": state.args.model, "pid": os.getpid()})
        elif path == "/tokenize" and json.loads(body)["prompt"].startswith("until "):
            state.note("tokenizes")
            wait_for(Path(json.loads(body)["prompt"].removeprefix("until ")))
            self._answer({"tokens": []})
        elif path == "/v1/responses":
            state.background = Path(json.loads(body)["input"])
            self._answer({"id": "r", "status": "queued"})
        else:
            self._answer({}, 404)

    def _answer(self, content: dict, status: int = 200, until: Path | None = None) -> None:
        """``until`` that file is there, only the head."""
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        if until is not None:
            wait_for(until)
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--journal", required=True)
    parser.add_argument("--alias", action="append", default=[])
    parser.add_argument("--reports-memory", action="store_true", help="as this package does")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.0)
    parser.add_argument("--says", help="a line of its log")
    parser.add_argument("--exits", type=int, help="in place of serving")
    parser.add_argument("--waits-for", help="a file, before it serves")
    parser.add_argument("--serves-while", help="a file; else it exits at the start")
    parser.add_argument("--without-sleep", action="store_true", help="endpoints, as by default")
    parser.add_argument("--fails-sleep-until", help="a file")
    parser.add_argument("--ignores-sigterm", action="store_true")
    parser.add_argument("--with-child", action="store_true")
    args = parser.parse_args()
    Handler.state = state = State(args)
    state.note(f"starts {os.environ.get('ASCEND_RT_VISIBLE_DEVICES', '')}".strip())
    if args.says:
        print(args.says, flush=True)
    if args.with_child and os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if args.ignores_sigterm:
        signal.signal(signal.SIGTERM, lambda *_: state.note("ignores SIGTERM"))
    else:
        signal.signal(signal.SIGTERM, lambda *_: (state.hold(0), state.note("ends"), os._exit(0)))
    if args.exits is not None:
        print("first line\nit has no model, password-of-this\n", flush=True)
        sys.exit(args.exits)
    if args.serves_while and not Path(args.serves_while).exists():
        sys.exit("not today")
    if args.waits_for:
        wait_for(Path(args.waits_for))
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
