# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep-proxy``: one OpenAI-compatible port before vLLM servers that take turns on a device.

Each server runs with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode; start all but the last and put
each to sleep (vllm-sleep sleep URL) before the next. A request wakes the model that it names. Let
users reach only the proxy: a server that is asked directly does not wake.
"""

import argparse
import asyncio
import logging
import sys

import uvicorn

from vllm_sleep_ascend.client import SleepClient
from vllm_sleep_ascend.proxy.app import Proxy
from vllm_sleep_ascend.proxy.metrics import Metrics
from vllm_sleep_ascend.proxy.turns import Server, Turns

LOOPBACK = "127.0.0.1"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-sleep-proxy",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("urls", nargs="+", metavar="URL", help="of a vLLM server")
    add("--host", default=LOOPBACK, help="where users are served")
    add("--port", type=int, default=8000)
    add("--admin-port", type=int, default=8100, help="status, sleep, wake, metrics; loopback only")
    add("--level", type=int, choices=(1, 2), default=1, help="of sleep")
    add("--max-queue", type=int, default=256, help="requests that may wait; more get a 503")
    add("--turn-s", type=float, default=2.0, help="served on for, once awake, while another waits")
    add("--idle-s", type=float, default=0.0, help="without a request before sleep; 0: never")
    add("--max-awake", type=int, default=1, help="servers that fit on the device together")
    add("--timeout-s", type=float, default=600.0, help="that a sleep or a wake may take")
    return parser


async def _serve(args: argparse.Namespace) -> None:
    servers = [Server(SleepClient(url, args.timeout_s)) for url in args.urls]
    turns = Turns(
        servers,
        Metrics(),
        level=args.level,
        max_queue=args.max_queue,
        turn_s=args.turn_s,
        idle_s=args.idle_s,
        max_awake=args.max_awake,
    )
    proxy = Proxy(turns)
    listeners = [
        uvicorn.Server(uvicorn.Config(proxy.public, args.host, args.port, access_log=False)),
        uvicorn.Server(uvicorn.Config(proxy.admin, LOOPBACK, args.admin_port, access_log=False)),
    ]

    async def serve(listener: uvicorn.Server) -> None:
        try:
            await listener.serve()
        finally:
            for other in listeners:
                other.should_exit = True

    await asyncio.gather(*(serve(listener) for listener in listeners))


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``vllm-sleep-proxy``."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name, least in (("max_queue", 1), ("max_awake", 1), ("turn_s", 0), ("idle_s", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        asyncio.run(_serve(args))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
