# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep-proxy``: one OpenAI-compatible port for vLLM servers that take turns on a device.

A request wakes the model that it names. With --config the proxy also starts the servers, watches
them, and ends them with itself (models.yaml is described in docs/guide.md). SIGHUP reads the file
again; SIGTERM lets running requests end, a second one does not.

With URLs somebody else starts them. Each server runs with --enable-sleep-mode and an admin door
(admin_port or admin_socket), or with VLLM_SERVER_DEV_MODE=1; start all but the last and put each to
sleep (vllm-sleep sleep ADMIN) before the next. Let users reach only the proxy: a server that is
asked directly does not wake. The key of the doors and of the admin port is that of the environment,
SLEEP_ADMIN_KEY, or of --admin-key-file. Servers that ask for an API key (--api-key) get
VLLM_API_KEY; users send theirs.
"""

import argparse
import asyncio
import logging
import math
import os
import resource
import signal
import sys
from pathlib import Path

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.client.sleep_client import SleepClient
from vllm_sleep_ascend.proxy.config import models
from vllm_sleep_ascend.proxy.config.lines import Invalid
from vllm_sleep_ascend.proxy.config.model import API_KEY
from vllm_sleep_ascend.proxy.fleet import Defaults, Fleet
from vllm_sleep_ascend.proxy.http.admin import Admin
from vllm_sleep_ascend.proxy.http.listening import Listeners, on_signals
from vllm_sleep_ascend.proxy.http.public import Public
from vllm_sleep_ascend.proxy.launch import state
from vllm_sleep_ascend.proxy.metrics import Metrics
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Settings, Turns

LOOPBACK = "127.0.0.1"
_DESCRIPTORS = 65535


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-sleep-proxy",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("urls", nargs="*", metavar="URL[,ADMIN]", help="of a vLLM server, and of its admin door")
    add("--config", metavar="FILE", help="models.yaml, in place of URLs")
    add("--check", action="store_true", help="only print what is wrong in it, by line")
    add("--state-dir", type=Path, help="logs and records of the servers (by --port, in ~/.local)")
    add("--leave-servers", action="store_true", help="let them go on; the next proxy finds them")
    add("--host", default=LOOPBACK, help="where users are served")
    add("--port", type=int, default=8000)
    add("--admin-port", type=int, default=8100, help="a page, status, metrics; loopback only")
    add("--admin-key-file", help="of the admin port and the servers' doors")
    add("--level", type=int, choices=(1, 2), default=1, help="of sleep")
    add("--max-queue", type=int, default=256, help="requests that may wait; more get a 503")
    add("--max-body-mib", type=int, default=64, help="of a request; larger ones get a 413")
    add("--turn-s", type=float, default=2.0, help="served on for, once awake, while another waits")
    add("--idle-s", type=float, default=0.0, help="without a request before sleep; 0: never")
    add("--max-awake", type=_max_awake, default=1, help=f"servers on a device, or {models.FIT}")
    add(
        "--link-gbps",
        type=float,
        help="GB/s of a device's link, for the page: its share that is used",
    )
    add("--timeout-s", type=float, default=600.0, help="that a sleep or a wake may take")
    add("--grace-s", type=int, default=60, help="that running requests get when the proxy ends")
    return parser


def _max_awake(text: str) -> int | str:
    try:
        return text if text == models.FIT else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number, or {models.FIT}") from None


def _servers(args: argparse.Namespace, door_key: str | None) -> list[Server]:
    """Those of the URLs."""
    servers = []
    for pair in args.urls:
        url, _, door = pair.partition(",")
        key = os.environ.get(API_KEY)
        client = SleepClient(url, args.timeout_s, api_key=key, door=door or None, door_key=door_key)
        servers.append(Server(client, level=args.level))
    return servers


async def _serve(args: argparse.Namespace) -> int:
    door_key = admin_key.read(args.admin_key_file)
    max_awake = None if args.max_awake == models.FIT else args.max_awake
    settings = Settings(args.max_queue, args.turn_s, args.idle_s, max_awake, args.link_gbps)
    turns = Turns(_servers(args, door_key), Metrics(), settings)
    admin = Admin(turns, door_key)
    listeners = Listeners(
        [
            (Public(turns, args.max_body_mib << 20).app, args.host, args.port),
            (admin.app, LOOPBACK, args.admin_port),
        ],
        args.grace_s,
        at_stop=admin.close,
    )
    if args.config is None:
        on_signals(listeners.stop, listeners.stop_at_once)
        return await listeners.serve()
    defaults = Defaults(args.level, args.timeout_s, door_key)
    folder = state.State(args.state_dir or state.default(args.port))
    fleet = Fleet(args.config, defaults, turns, folder, args.leave_servers)

    def at_once() -> None:
        listeners.stop_at_once()
        fleet.hurry()

    on_signals(listeners.stop, at_once)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, fleet.reload)
    async with fleet:
        return await listeners.serve()


def _check(file: str, level: int) -> int:
    try:
        entries = models.load(file, None, level).entries
    except Invalid as error:
        print(error)
        return 1
    started = sum(entry.model.command is not None for entry in entries)
    print(f"{file}: {len(entries)} models, of which the proxy starts {started}")
    return 0


def _allow_descriptors() -> None:
    """Each stream takes two; the usual limit, 1024, is for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``vllm-sleep-proxy``."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("max_queue", "max_awake", "max_body_mib", "timeout_s", "grace_s"):
        if getattr(args, name) != models.FIT and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("turn_s", "idle_s"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if args.link_gbps is not None and not 0 < args.link_gbps < math.inf:
        parser.error("--link-gbps must be above 0")
    if bool(args.urls) == (args.config is not None):
        parser.error("name either URLs or --config models.yaml")
    if args.config is None and (args.check or args.state_dir or args.leave_servers):
        parser.error("--check, --state-dir and --leave-servers are for --config")
    if args.check:
        return _check(args.config, args.level)
    urls = [pair.partition(",")[0] for pair in args.urls]
    twice = {url for url in urls if urls.count(url) > 1}
    if twice:
        parser.error(f"{', '.join(twice)} is named more than once")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _allow_descriptors()
    try:
        return asyncio.run(_serve(args))
    except Invalid as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
