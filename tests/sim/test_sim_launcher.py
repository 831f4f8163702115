# SPDX-License-Identifier: Apache-2.0
"""The `npu-sim` command, the toolkit's layout, and the torch hook."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.machine import LAUNCHER

TOOLKIT = Path(os.environ["ASCEND_HOME_PATH"])
CANN_8_1 = ROOT / "csrc" / "sim" / "cann_8_1.map"


def launch(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND_")}
    kept.pop("LD_LIBRARY_PATH")
    return subprocess.run(
        [*LAUNCHER, *command],
        env={**kept, "NPU_SIM_HOME": str(TOOLKIT), **environment},
        capture_output=True,
        text=True,
    )


def test_a_command_runs_under_the_toolkit() -> None:
    code = "import os, torch; print(os.environ['ASCEND_HOME_PATH'], torch.npu.device_count())"
    result = launch("python", "-c", code)
    assert result.stdout.split() == [str(TOOLKIT), "2"], result.stderr


def test_torchvision_is_imported_though_its_library_is_for_cuda() -> None:
    """PyPI's wheel for x86-64, beside a torch for CPUs."""
    code = (
        "import torch; from torchvision.transforms.v2 import functional as f;"
        "print(*f.resize(torch.zeros(3, 8, 8), [4, 2]).shape)"
    )
    result = launch("python", "-c", code)
    assert result.stdout.split() == ["3", "4", "2"], result.stderr


def test_its_exit_status_is_the_commands() -> None:
    assert launch("sh", "-c", "exit 7").returncode == 7


def test_timers_of_the_command_may_be_late() -> None:
    assert launch("cat", "/proc/self/timerslack_ns").stdout.strip() == "1000000"


def test_a_command_that_is_not_there() -> None:
    result = launch("no-such-command")
    assert result.returncode == 1
    assert "no-such-command" in result.stderr
    assert launch().returncode == 1


def test_a_toolkit_that_is_not_there(tmp_path: Path) -> None:
    result = launch("true", NPU_SIM_HOME=str(tmp_path))
    assert result.returncode == 1
    assert f"make -C csrc/sim PREFIX={tmp_path}" in result.stderr


@pytest.mark.parametrize(("cann", "version"), [("", "8.5.0"), ("8.5", "8.5.0"), ("8.1", "8.1.0")])
def test_cann_8_1_lacks_what_is_newer(cann: str, version: str) -> None:
    newer = re.findall(r"^ +(acl\w+);$", CANN_8_1.read_text(), re.MULTILINE)
    assert "aclrtHostRegisterV2" in newer
    code = (
        "import ctypes, os, torch\n"
        "library = ctypes.CDLL('libascendcl.so')\n"
        f"found = [name for name in {newer} if hasattr(library, name)]\n"
        "text = ctypes.create_string_buffer(64)\n"
        "library.aclsysGetVersionStr(b'runtime', text)\n"
        "installed = open(f'{os.environ[\"ASCEND_HOME_PATH\"]}/version.info').read()\n"
        "numbers = torch.ones(3).npu().cpu()\n"
        "print(len(found), text.value.decode(), installed.strip(), len(numbers))\n"
    )
    result = launch("python", "-c", code, NPU_SIM_CANN=cann)
    found = 0 if cann == "8.1" else len(newer)
    assert result.stdout == f"{found} {version} Version={version} 3\n", result.stderr


def test_a_cann_that_is_not_simulated() -> None:
    result = launch("true", NPU_SIM_CANN="7.0")
    assert result.returncode == 1
    assert "NPU_SIM_CANN=7.0: choose one of 8.5, 8.1" in result.stderr


@pytest.mark.parametrize(
    ("kernel", "release"), [("", "5.10.0"), ("6.1", "6.1.0"), ("5.15.0-91-x", "5.15.0-91-x")]
)
def test_python_programs_see_the_kernel_that_is_set(kernel: str, release: str) -> None:
    code = "import os, platform; print(os.uname().release, os.uname()[2], platform.release())"
    result = launch("python", "-c", code, NPU_SIM_KERNEL=kernel)
    assert result.stdout.split() == [release] * 3
    assert result.stderr == ""


def test_the_users_own_start_up_file_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.mine = 'mine'\n")
    result = launch("python", "-c", "print(mine)", PYTHONPATH=str(tmp_path))
    assert result.stdout == "mine\n", result.stderr


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_set_env(shell: str) -> None:
    script = f". {TOOLKIT}/set_env.sh; echo $ASCEND_HOME_PATH $ASCEND_OPP_PATH $LD_LIBRARY_PATH"
    if shell == "sh":
        script = f"cd {TOOLKIT} && . ./set_env.sh; echo ok"
    result = subprocess.run([shell, "-c", script], capture_output=True, text=True)
    expected = [f"{TOOLKIT}", f"{TOOLKIT}/opp"]
    assert result.stdout.split()[:2] == (expected if shell == "bash" else ["ok"])


@pytest.mark.parametrize(
    "path",
    [
        "include/acl/acl.h",
        "include/hccl/hccl.h",
        "lib64/libascendcl.so",
        "lib64/libhccl.so",
        "opp",
        "runtime",
        "compiler",
        "version.cfg",
        "set_env.sh",
    ],
)
def test_the_toolkit_is_laid_out_as_cann(path: str) -> None:
    assert (TOOLKIT / path).exists()


def test_the_hook_does_nothing_without_the_operators(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from vllm_sleep_ascend.sim.backend import load_operators\n"
        "load_operators()\n"
        "assert 'torch' not in sys.modules"
    )
    for toolkit in ({}, {"ASCEND_HOME_PATH": str(tmp_path)}):
        kept = {k: v for k, v in os.environ.items() if k != "ASCEND_HOME_PATH"}
        result = subprocess.run(
            [sys.executable, "-c", code], env={**kept, **toolkit}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
