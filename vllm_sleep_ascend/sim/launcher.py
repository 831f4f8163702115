# SPDX-License-Identifier: Apache-2.0
"""`npu-sim CMD…`: run a command with the simulated toolkit in place of CANN."""

import ctypes
import os
import sys
from pathlib import Path

_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1_000_000

# CANN version -> its folder in the toolkit.
CANNS = {"8.5": ".", "8.1": "cann-8.1"}


def toolkit_path() -> Path:
    """The simulated toolkit: `$NPU_SIM_HOME`, else `npu-sim` in this Python's prefix."""
    return Path(os.environ.get("NPU_SIM_HOME") or Path(sys.prefix) / "npu-sim")


def toolkit_environment(toolkit: Path) -> dict[str, str]:
    """The current environment with the variables that the toolkit's `set_env.sh` exports."""
    environment = dict(os.environ)
    libraries = [str(toolkit / "lib64"), environment.get("LD_LIBRARY_PATH", "")]
    # Its sitecustomize.py applies NPU_SIM_KERNEL.
    modules = [str(toolkit / "python" / "site-packages"), environment.get("PYTHONPATH", "")]
    environment.update(
        ASCEND_TOOLKIT_HOME=str(toolkit),
        ASCEND_HOME_PATH=str(toolkit),
        ASCEND_OPP_PATH=str(toolkit / "opp"),
        ASCEND_AICPU_PATH=str(toolkit),
        LD_LIBRARY_PATH=":".join(filter(None, libraries)),
        PYTHONPATH=":".join(filter(None, modules)),
    )
    return environment


def _let_timers_be_late() -> None:
    """In this process and in all that it starts, timers may be a millisecond late.

    In each process that uses the device, a thread of torch_npu polls every 50 µs, which takes much
    of the few processors that a simulated machine has (``ReleaseQueue`` in its ``NPUQueue.cpp``).
    """
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_TIMER_SLACK_NS))


def main() -> None:
    """Entry point of the `npu-sim` command."""
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        sys.exit("usage: npu-sim COMMAND [ARGUMENT …]")
    cann = os.environ.get("NPU_SIM_CANN") or next(iter(CANNS))
    if cann not in CANNS:
        sys.exit(f"npu-sim: NPU_SIM_CANN={cann}: choose one of {', '.join(CANNS)}")
    home = toolkit_path()
    toolkit = home / CANNS[cann]
    if not (toolkit / "lib64" / "libascendcl.so").exists():
        sys.exit(
            f"npu-sim: no simulated toolkit in {toolkit}; build it with "
            f"`make -C csrc/sim PREFIX={home} PYTHON={sys.executable}` in the source tree, "
            "or name its folder in NPU_SIM_HOME"
        )
    # As in an activated environment, the commands of this Python come first.
    environment = toolkit_environment(toolkit)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', os.defpath)}"
    _let_timers_be_late()
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        sys.exit(f"npu-sim: command not found: {command[0]}")


if __name__ == "__main__":
    main()
