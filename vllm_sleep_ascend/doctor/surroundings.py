# SPDX-License-Identifier: Apache-2.0
"""Checks that need no device: host, driver, CANN, packages, environment, model."""

import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from vllm_sleep_ascend.doctor.finding import Finding, degraded, failed, info, passed
from vllm_sleep_ascend.doctor.sizes import MIB, gib
from vllm_sleep_ascend.memory.host import available_host_bytes, why_registered_pages_move

_CAP_IPC_LOCK = 14

# The tested combinations, by distribution name.
_TORCH = {"torch": "2.13.0", "torch_npu": "2.13.0"}
TESTED: tuple[Mapping[str, str], ...] = (
    {"vllm": "0.33.0", "torch": "2.14.0", "torch_npu": "2.14.0"},
    {"vllm": "0.32.0", **_TORCH},
    {"vllm": "0.23.0", "vllm-ascend": "0.23.0", **_TORCH},
    {"vllm": "0.23.0", "vllm-ascend": "0.23.0.post1", **_TORCH},
)

_NPU_SMI_S = 5.0
DRIVER = Path("/usr/local/Ascend/driver/version.info")
TOOLKITS = (Path("/usr/local/Ascend/ascend-toolkit/latest"), Path("/usr/local/Ascend/cann"))
SET_ENV = "source CANN's set_env.sh, such as /usr/local/Ascend/ascend-toolkit/set_env.sh"


def find() -> dict[str, tuple[str, Finding]]:
    """Title and finding of each check, by name."""
    things: tuple[tuple[str, str, Callable[[], Finding]], ...] = (
        ("kernel", "kernel", kernel),
        ("driver", "driver", driver),
        ("cann", "CANN", cann),
        ("page_size", "page size", page_size),
        ("memlock", "ulimit -l", memlock),
        ("host_memory", "host memory", host_memory),
        ("container", "container's limit", container_limit),
        ("versions", "packages", versions),
        ("allocator", "allocator", allocator),
        ("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", visible_devices),
    )
    found = {name: (title, look()) for name, title, look in things}
    return found | {name: (name, variable(name)) for name in REMARKS}


# --- The host


def kernel() -> Finding:
    name = os.uname()
    return info(f"{name.release} ({name.machine})", release=name.release, machine=name.machine)


def driver(file: Path = DRIVER) -> Finding:
    for line in _lines(file):
        key, _, value = line.partition("=")
        if key.strip().lower() == "version" and value.strip():
            return info(f"{value.strip()} ({file})", version=value.strip())
    try:
        if found := _npu_smi():
            return info(f"npu-smi {found}", version=found)
    except TimeoutError as error:
        return degraded(
            str(error),
            "The driver may hang. Processes that use it then hang too, and cannot be killed.",
            "See dmesg; if npu-smi info does not answer in a shell either, reset the device or "
            "restart the host.",
            version=None,
        )
    return info(f"unknown: no {file} and no npu-smi here; a container may lack them", version=None)


def _npu_smi() -> str:
    """The driver's version as npu-smi prints it, or ``""`` without npu-smi.

    Raises:
        TimeoutError: npu-smi does not end in time. It is left behind, because a process that hangs
            in the driver cannot be killed.
    """
    program = shutil.which("npu-smi")
    if program is None:
        return ""
    with tempfile.TemporaryFile() as output:
        none = subprocess.DEVNULL
        try:
            process = subprocess.Popen([program, "info"], stdin=none, stdout=output, stderr=none)
        except OSError:
            return ""
        try:
            process.wait(_NPU_SMI_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise TimeoutError(f"npu-smi info did not end in {_NPU_SMI_S:g} s") from None
        output.seek(0)
        match = re.search(r"Version:\s*([\w.]+)", output.read().decode(errors="replace"))
    return match[1] if match else ""


def cann() -> Finding:
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        there = [str(path) for path in TOOLKITS if path.exists()]
        where = f"there is {' and '.join(there)}" if there else "none in /usr/local/Ascend"
        return failed(
            f"ASCEND_HOME_PATH is not set; {where}",
            "Programs do not find AscendCL, and torch_npu does not load.",
            f"Install CANN, and {SET_ENV}.",
            version=None,
        )
    version = _cann_version(Path(home))
    if version is None:
        return degraded(
            f"{home} has no version file",
            "The version of CANN is unknown.",
            "Check that ASCEND_HOME_PATH names the toolkit, not a parent folder.",
            version=None,
            home=home,
        )
    return info(f"{version} ({home})", version=version, home=home)


def _cann_version(home: Path) -> str | None:
    """From the files of CANN's packages; ascend_*_install.info first."""
    for file in sorted(home.glob("*-linux/ascend_*_install.info")):
        for line in _lines(file):
            if line.startswith("version="):
                return line.partition("=")[2].strip()
    for line in _lines(home / "version.cfg"):
        # toolkit_running_version=[7.6.0.1.220:8.0.0]: the second is the release.
        if match := re.match(r"\w+_running_version=\[([^\]:]*):?([^\]]*)\]", line):
            return match[2] if match[2][:1].isdigit() else match[1]
    for file in (home / "version.info", *sorted(home.glob("*/version.info"))):
        for line in _lines(file):
            if line.lower().startswith("version="):
                return line.partition("=")[2].strip()
    return None


def page_size(size: int = resource.getpagesize()) -> Finding:
    huge = size * size // 8  # a page of entries of 8 bytes
    if huge <= 2 * MIB:
        return info(f"{size} bytes", bytes=size)
    return info(
        f"{size} bytes: a huge page has {huge // MIB} MiB, more than a block of host memory, so "
        "blocks take longer to allocate",
        bytes=size,
    )


def memlock(weights: int = 0) -> Finding:
    """Compare the limit with the bytes of weights that a process may have to lock."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return info("unlimited", bytes=None)
    if _has_capability(_CAP_IPC_LOCK):
        return info(f"{soft} bytes, but CAP_IPC_LOCK lifts the limit", bytes=None)
    if weights > soft and not why_registered_pages_move():
        return degraded(
            f"{soft} bytes, and {gib(weights)} of weights",
            "Where memory can be registered (see the probe), backups are such memory up to the "
            "limit, and beyond it memory from aclrtMallocHost, which takes longer to get.",
            "Raise ulimit -l; in a container, --ulimit memlock=-1.",
            bytes=soft,
        )
    what = 'it limits registered memory (host_memory="registered"), not aclrtMallocHost'
    return info(f"{soft} bytes: {what}", bytes=soft)


def _has_capability(number: int) -> bool:
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def host_memory() -> Finding:
    available = available_host_bytes()
    return info(f"{gib(available)} available for backups", available_bytes=available)


def container_limit() -> Finding:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        for line in _lines(Path(file)):
            if line.isdigit() and int(line) < 1 << 60:
                return info(f"{gib(int(line))} ({file})", bytes=int(line))
    return info("none", bytes=None)


# --- What is installed


def versions() -> Finding:
    installed = {}
    for name in ("vllm", "vllm-ascend", "torch", "torch_npu"):
        try:
            installed[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    text = ", ".join(f"{name} {version}" for name, version in installed.items()) or "none of vLLM's"
    figures = {"installed": installed, "tested_together": installed in TESTED}
    missing = [name for name in ("vllm", "torch", "torch_npu") if name not in installed]
    tested = "; ".join(
        ", ".join(f"{name} {version}" for name, version in together.items()) for together in TESTED
    )
    if missing:
        return failed(
            f"{text}; missing: {', '.join(missing)}",
            "No engine can run.",
            "Install what is missing, in the order that COMPILE.md says.",
            **figures,
        )
    if not figures["tested_together"]:
        return degraded(
            f"{text}: not tested together",
            "APIs that sleep mode uses may have changed.",
            f"Tested versions: {tested}.",
            **figures,
        )
    return passed(f"{text}: tested together", **figures)


def allocator() -> Finding:
    try:
        from vllm_sleep_ascend import _camem
    except ImportError as error:
        text = str(error)
        if "undefined symbol" in text:
            remedy = "Install CANN 8.1 or newer: this one lacks a function that sleep mode needs."
        elif "cannot open shared object" in text:
            remedy = f"In this shell, {SET_ENV}."
        else:
            remedy = "Install the package again with COMPILE_CUSTOM_KERNELS=1 (COMPILE.md)."
        return failed(f"cannot be loaded: {text}", "Sleep mode is refused.", remedy, loaded=False)
    return passed(Path(_camem.__file__).name, loaded=True)


# --- Environment variables


def _expandable(value: str) -> str:
    if "expandable_segments:true" in value.lower().replace(" ", ""):
        return "expandable segments pause while memory that can sleep is allocated"
    return ""


def _nz(_: str) -> str:
    return "beside vllm-ascend, 0 lets level 2 and reload_weights write weights again"


def _dev_mode(value: str) -> str:
    if value == "1":
        return "servers have /sleep and /wake_up; do not expose them"
    return "servers started so have no /sleep and /wake_up"


def _hccl_buffer(value: str) -> str:
    size = value if value.isdigit() else "200"
    return (
        f"each communicator holds 2 x {size} MiB of device memory, also asleep, unless "
        "release_communicators is set"
    )


REMARKS: dict[str, Callable[[str], str]] = {
    "PYTORCH_NPU_ALLOC_CONF": _expandable,
    "PYTORCH_ALLOC_CONF": _expandable,
    "VLLM_ASCEND_ENABLE_NZ": _nz,
    "VLLM_SERVER_DEV_MODE": _dev_mode,
    "HCCL_BUFFSIZE": _hccl_buffer,
}


def variable(name: str) -> Finding:
    """What one of ``REMARKS`` is set to, and what follows from that."""
    value = os.environ.get(name)
    remark = REMARKS[name](value or "")
    return info(": ".join(filter(None, (value or "not set", remark))), value=value)


def visible_devices() -> Finding:
    value = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if value is None:
        return info("not set: all devices are visible", value=None)
    numbers = [int(number) for number in value.split(",") if number.strip().isdigit()]
    if len(numbers) <= value.count(",") or numbers != sorted(set(numbers)):
        return degraded(
            f"{value}: not numbers in ascending order",
            "CANN ignores the list from the first entry that is not a device. In another order, no "
            "device is visible.",
            "Name each device once, in ascending order.",
            value=value,
        )
    return info(f"{value}: these devices are visible, and are numbered from 0", value=value)


# --- A model


def weight_bytes(model: Path) -> int:
    """The size of a checkpoint's safetensors on disk.

    Raises:
        ValueError: there are none.
    """
    if not model.is_dir():
        raise ValueError(f"--model {model} is not a folder; name the one with the *.safetensors")
    index = model / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = [model / name for name in sorted(names)]
    else:
        files = sorted(model.glob("*.safetensors"))
        # Mistral's checkpoints contain the same weights twice.
        files = [file for file in files if not file.name.startswith("consolidated")] or files
    sizes = [file.stat().st_size for file in files if file.exists()]
    if not sizes:
        raise ValueError(f"--model {model} has no *.safetensors")
    return sum(sizes)


def weights(model: Path, devices: int) -> Finding:
    """Compare the host's memory with the weights of a model.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    size, available = weight_bytes(model), available_host_bytes()
    figures = {"weights_bytes": size, "available_bytes": available, "devices": devices}
    text = f"{gib(size)} of weights, {gib(available)} of host memory"
    if size > available:
        return degraded(
            f"{text}: level 1 does not fit",
            "A sleep at level 1 is refused.",
            "Free host memory, raise the container's limit, or use level 2, which keeps no backup.",
            **figures,
            fits=0,
        )
    fits = available // size
    each = f"{devices} devices, if each has a whole copy" if devices > 1 else "one engine"
    if fits < devices:
        return degraded(
            f"{text}: {fits} of {devices} whole copies fit",
            "Tensor-parallel ranks share one copy, which fits. With a whole copy on each device "
            "(data parallel, several servers), not all can sleep at level 1.",
            "Use level 2 for some of them, or add host memory.",
            **figures,
            fits=fits,
        )
    return passed(f"{text}: level 1 fits for {each}", **figures, fits=fits)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(errors="replace").splitlines()]
    except OSError:
        return []
