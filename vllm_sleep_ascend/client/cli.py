# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep``: status, sleep, wake, switch and images of vLLM servers, and a doctor for the
machine.

Exit codes: 0 done; 1 refused or failed, the reason is on stderr; 2 wrong usage; 3 a server is
unreachable. The doctor has its own. Progress goes to stderr, the summary to stdout: one line, or
with --json one object. A URL is that of a server's admin door (admin_port, or unix:/PATH for
admin_socket), or of a server in development mode. The door's key is that of --admin-key-file, or
of the environment, SLEEP_ADMIN_KEY, which goes only to this machine or over https. Servers that get
neither get VLLM_API_KEY.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.doctor import command as doctor
from vllm_sleep_ascend.policy import LEVELS, MODES, PLACES

if TYPE_CHECKING:  # the doctor must run with only the standard library
    from vllm_sleep_ascend.client.sleep_client import ServerStatus, SleepClient

CALL_S, SAVE_S = 600, 86400  # what a call may take; a disk can be slow

DONE, FAILED, USAGE, UNREACHABLE = range(4)

Clients = list["SleepClient"]
Result = tuple[str, Mapping[str, object]]  # text for people, and the object for --json
Command = Callable[[argparse.Namespace, Clients], Awaitable[Result]]


async def _status(args: argparse.Namespace, clients: Clients) -> Result:
    servers = [await client.status() for client in clients]
    return "\n".join(_describe(server) for server in servers), {"servers": servers}


async def _sleep(args: argparse.Namespace, clients: Clients) -> Result:
    await clients[0].sleep(args.level, args.mode, args.discard_trained, args.to)
    text = f"{args.url} sleeps at level {args.level}"
    if args.to is None:
        return text, {"level": args.level}
    lies = {"host": "in host memory", "disk": "on disk"}[args.to]
    return f"{text}, its backup {lies}", {"level": args.level, "to": args.to}


async def _wake(args: argparse.Namespace, clients: Clients) -> Result:
    if args.tags:
        await clients[0].wake(args.tags)
        return f"{args.url} woke {' and '.join(args.tags)}", {"tags": args.tags}
    await clients[0].wake_to_serve(args.level, args.discard_trained)
    return f"{args.url} is awake", {}


async def _save(args: argparse.Namespace, clients: Clients) -> Result:
    await clients[0].save_image(args.directory, args.replace)
    return f"{args.url} has saved its weights in {args.directory}", {"dir": args.directory}


async def _switch(args: argparse.Namespace, clients: Clients) -> Result:
    from vllm_sleep_ascend.client.switch import switch

    old, new = clients
    await switch(old, new, args.level, args.mode, args.overlap, args.discard_trained)
    text = f"switched from {args.from_url} to {args.to_url}"
    return text, {"level": args.level, "overlap": args.overlap}


def _describe(server: "ServerStatus") -> str:
    state = "asleep" if server["is_sleeping"] else "awake"
    parts = [f"{server['url']}: {state}", ", ".join(server["models"])]
    for rank in server["ranks"] or ():
        memory = [
            f"{tag} {usage['device'] / 2**20:.0f} MiB on the device and "
            f"{usage['host'] / 2**20:.0f} MiB on the host"
            + (f" and {usage['disk'] / 2**20:.0f} MiB on disk" if usage.get("disk") else "")
            for tag, usage in rank.get("tags", {}).items()
        ]
        if backups := rank.get("backups"):
            lie = {"in host memory": backups["host"], "on disk": backups["disk"]}
            memory += [f"backup of {n / 2**20:.0f} MiB {where}" for where, n in lie.items() if n]
        memory.append(f"{rank['free'] / 2**20:.0f} of {rank['total'] / 2**20:.0f} MiB free")
        if weights := rank.get("weights"):
            path = f" {weights['path']}" if weights["path"] else ""
            origin = f"weights from {weights['source']}{path}, version {weights['version']}"
            memory.append(origin)
        parts.append(f"rank {rank['rank']}: " + ", ".join(memory))
    return "; ".join(parts)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="vllm-sleep", description=description, epilog=rest)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Command, purpose: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=purpose, description=purpose)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object")
        made.add_argument("--quiet", action="store_true", help="no progress on stderr")
        help = f"seconds a call may take ({CALL_S}; for save {SAVE_S})"
        made.add_argument("--timeout", type=float, default=CALL_S, metavar="S", help=help)
        help = "the file with the key of the admin doors; nobody else may be able to read it"
        made.add_argument("--admin-key-file", metavar="FILE", help=help)
        return made

    def level(made: argparse.ArgumentParser, default: int | None, help: str) -> None:
        made.add_argument("--level", type=int, choices=LEVELS, default=default, help=help)

    def mode(made: argparse.ArgumentParser) -> None:
        help = "what becomes of running requests (abort)"
        made.add_argument("--mode", choices=MODES, default="abort", help=help)

    def discard_trained(made: argparse.ArgumentParser) -> None:
        help = "lose weights that a trainer sent and no checkpoint has (else refused at level 2)"
        made.add_argument("--discard-trained", action="store_true", help=help)

    made = command("status", _status, "what servers hold, and whether they sleep")
    made.add_argument("urls", nargs="+", metavar="URL")
    made = command("sleep", _sleep, "put a server to sleep")
    made.add_argument("url", metavar="URL")
    level(made, 1, "1: weights go to host memory or disk; 2: weights are forgotten (1)")
    help = (
        "where the backup goes, also that of a server that sleeps at level 1 (as its options say)"
    )
    made.add_argument("--to", choices=PLACES, help=help)
    mode(made)
    discard_trained(made)
    made = command("wake", _wake, "wake a server; after level 2, load its weights again")
    made.add_argument("url", metavar="URL")
    help = "wake only these (weights, kv_cache), and load nothing"
    made.add_argument("--tags", nargs="+", metavar="TAG", help=help)
    level(made, None, "the level at which it sleeps, where the server does not say (stock vLLM)")
    discard_trained(made)
    made = command("save", _save, "save the weights as an image, from which another server starts")
    made.add_argument("url", metavar="URL")
    help = "an absolute path on the server's hosts, that does not exist yet"
    made.add_argument("directory", metavar="DIR", help=help)
    help = "replace the image that is there"
    made.add_argument("--replace", action="store_true", help=help)
    made.set_defaults(timeout=SAVE_S)
    made = command("switch", _switch, "put one server to sleep and wake another")
    made.add_argument("from_url", metavar="FROM_URL")
    made.add_argument("to_url", metavar="TO_URL")
    level(made, 1, "of the sleep; stock vLLM is taken to have slept at it as well (1)")
    mode(made)
    discard_trained(made)
    made.add_argument("--overlap", action="store_true", help="sleep and wake at the same time")
    doctor.add_arguments(commands.add_parser("doctor", help=doctor.HELP))
    return parser


def key_for(address: str, file: str | None) -> str | None:
    """The key to send there. That of the environment leaves this machine only encrypted."""
    url = urlsplit(address)
    is_safe = url.scheme in ("unix", "https") or admin_key.is_loopback(url.hostname or "")
    key = admin_key.read(file) if file is not None or is_safe else None
    return key or os.environ.get("VLLM_API_KEY")


async def _run(args: argparse.Namespace) -> tuple[int, str, Mapping[str, object]]:
    from vllm_sleep_ascend.client.calls import CallFailed, Unreachable
    from vllm_sleep_ascend.client.sleep_client import SleepClient

    def progress(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    addresses = getattr(args, "urls", None) or [
        value for name in ("url", "from_url", "to_url") if (value := getattr(args, name, None))
    ]
    keys = [key_for(address, args.admin_key_file) for address in addresses]
    started = time.perf_counter()
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(SleepClient(address, args.timeout, progress, key))
            for address, key in zip(addresses, keys, strict=True)
        ]
        run: Command = args.run
        try:
            text, details = await run(args, clients)
            code = DONE
        except CallFailed as error:
            text, details = str(error), {"error": str(error)}
            code = UNREACHABLE if isinstance(error, Unreachable) else FAILED
        seconds = time.perf_counter() - started
        steps = [step for client in clients for step in client.steps]
    if code == DONE and steps:
        text += f" in {seconds:.3f} s"
    report = {"command": args.command, "ok": code == DONE, "seconds": round(seconds, 4), **details}
    return code, text, {**report, "steps": steps} if steps else report


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "doctor":
        return doctor.run(args)
    try:
        code, text, report = asyncio.run(_run(args))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return FAILED
    if args.json:
        print(json.dumps(report))
    if code != DONE:
        print(f"vllm-sleep: {text}", file=sys.stderr)
    elif not args.json:
        print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
