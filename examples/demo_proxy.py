# SPDX-License-Identifier: Apache-2.0
"""`make demo-proxy`: models behind the proxy on a simulated NPU, and the address of its page, until
Ctrl-C.

python examples/demo_proxy.py WORK MODEL MODEL [--port PORT] [--admin-port PORT]
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

OPTIONS = (
    *("--enable-sleep-mode", "--dtype", "float32", "--gpu-memory-utilization", "0.4"),
    *("--max-model-len", "512", "--max-num-batched-tokens", "256", "--max-num-seqs", "8"),
    *("--additional-config", '{"sleep_mode": {"chunk_mib": 2, "admin_port": ${ADMIN_PORT}}}'),
)
LAST_LINES = 15


def entry(folder: Path) -> dict[str, object]:
    """One model of models.yaml."""
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder.resolve())]
    where = ["--host", "127.0.0.1", "--port", "${PORT}", "--served-model-name", folder.name]
    return {"command": [*serve, *where, *OPTIONS], "devices": 0, "preload": True}


def is_up(address: str, proxy: "subprocess.Popen[bytes]") -> bool:
    """Whether the proxy serves; False once it has ended."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy is
    while proxy.poll() is None:
        try:
            with direct.open(f"{address}health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("work", type=Path, help="folder for models.yaml and the logs")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folder of one")
    parser.add_argument("--port", type=int, default=8000, help="of the models")
    parser.add_argument("--admin-port", type=int, default=8100, help="of the page")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    models = {folder.name: entry(folder) for folder in args.models}
    config, log = args.work / "models.yaml", args.work / "proxy.log"
    config.write_text(json.dumps({"models": models}, indent=2))  # which is YAML too
    simulator = Path(sys.executable).with_name("npu-sim")
    program = (simulator, sys.executable, "-m", "vllm_sleep_ascend.proxy", "--config", config)
    where = ("--port", str(args.port), "--admin-port", str(args.admin_port))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # until there is a proxy to pass them on to
    with log.open("wb") as out:
        proxy = subprocess.Popen(
            [*program, *where, "--state-dir", args.work / "state", "--grace-s", "5"],
            env={"NPU_SIM_HBM_GIB": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # Ctrl-C is for this program alone, which passes on one signal
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers),
        )
    for number in numbers:
        signal.signal(number, lambda *_: proxy.terminate())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    address = f"http://127.0.0.1:{args.admin_port}/"
    try:
        if is_up(address, proxy):
            print(f"The page:   {address}")
            print(f"The models: {', '.join(models)}, at http://127.0.0.1:{args.port}/v1")
            print(f"The log:    {log}")
            print("The servers start now, one after the other, which takes about a minute.")
            print("Ctrl-C ends all of it.", flush=True)
    except BaseException:
        proxy.terminate()
        proxy.wait()
        raise
    if (code := proxy.wait()) != 0:
        last = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        print(*last, f"The proxy has failed. The whole log is in {log}", sep="\n", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
