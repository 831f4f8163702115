# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the offline example on a simulated NPU, with figures on the terminal and the
engine's log in a file.

python examples/demo.py MODEL LOG
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

EXAMPLE = Path(__file__).with_name("offline_sleep.py")
SHOWN = re.compile("Free memory|In use|Host memory of|Before sleep:|After waking:|The output after")
LAST_LINES = 30


def lines(process: subprocess.Popen[bytes], log: Path) -> Iterator[str]:
    """The lines that a process writes to ``log``, until the process has ended."""
    with log.open(errors="replace") as written:
        line = ""
        while True:
            ended = process.poll() is not None
            while part := written.readline():
                line += part
                if line.endswith("\n"):
                    yield line
                    line = ""
            if ended:
                return
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("log", type=Path, help="file for the engine's log")
    args = parser.parse_args()

    args.log.parent.mkdir(parents=True, exist_ok=True)
    simulator = Path(sys.executable).with_name("npu-sim")
    options = ("--max-model-len", "2048", "--max-num-batched-tokens", "512")
    with args.log.open("wb") as out:
        process = subprocess.Popen(
            [simulator, sys.executable, EXAMPLE, args.model, *options],
            env={"NPU_SIM_HBM_GIB": "4", **os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    print(f"The engine's log is in {args.log}")
    print("Starting the engine on a simulated NPU; this takes about a minute ...", flush=True)
    for line in lines(process, args.log):
        if SHOWN.match(line):
            print(line, end="", flush=True)
    if process.returncode != 0:
        last = args.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        print(*last, f"The demo failed. The whole log is in {args.log}", sep="\n", file=sys.stderr)
        sys.exit(1)
    print("The seconds are the simulator's; they say nothing about an NPU.")


if __name__ == "__main__":
    main()
