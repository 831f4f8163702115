# SPDX-License-Identifier: Apache-2.0
"""csrc/sim/calls.md names every call that this package makes and that the simulator answers."""

import importlib.util
import os
import re
import subprocess
from ctypes import byref, c_int32, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.ascendcl import (
    HBM_MEM,
    HOST_TO_DEVICE,
    HUGE,
    INVALID_PARAM,
    REGISTER_PINNED,
    call,
    message,
    prop,
)

PAGE = ROOT / "csrc" / "sim" / "calls.md"
OURS, TORCHS, OTHERS = (
    "What this package calls",
    "What torch_npu calls besides",
    "What neither calls",
)
CALL = r"\b(acl(?:rt|mdl|sys)?[A-Z]\w*)"
SIMULATED = Path(os.environ["ASCEND_HOME_PATH"], "lib64", "libascendcl.so")


def rows(section: str) -> list[list[str]]:
    """The cells of its tables, without header rows."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    heads = [index for index, row in enumerate(cells) if set(row[0]) == {"-"}]
    return [row for index, row in enumerate(cells) if index not in heads and index + 1 not in heads]


@cache
def names(section: str) -> list[str]:
    return [name for row in rows(section) for name in re.findall(r"`(\w+)`", row[0])]


def called_in_cpp() -> set[str]:
    sources = (ROOT / "csrc").rglob("*.cpp")
    own = [source for source in sources if "sim" not in source.relative_to(ROOT / "csrc").parts]
    assert own
    code = "\n".join(re.sub(r"//.*", "", source.read_text()) for source in own)
    return set(re.findall(CALL + r"\(", code)) | set(re.findall(rf'"{CALL}"\)', code))


def called_by_the_doctor() -> set[str]:
    folder = ROOT / "vllm_sleep_ascend" / "doctor"
    code = "\n".join(source.read_text() for source in folder.rglob("*.py"))
    return set(re.findall(rf'"{CALL}"', code))


def symbols(library: Path, kind: str) -> set[str]:
    done = subprocess.run(["nm", "-D", kind, library], capture_output=True, text=True, check=True)
    last = (line.split()[-1].split("@")[0] for line in done.stdout.splitlines())
    return {name for name in last if re.match(r"(acl|rt[A-Z]|Msprof)", name)}


def test_every_call_of_this_package_has_a_row() -> None:
    ours = called_in_cpp() | called_by_the_doctor()
    assert {"aclrtMapMem", "aclrtHostRegisterV2", "aclGetRecentErrMsg", "aclFinalize"} <= ours
    assert set(names(OURS)) == ours


def test_every_call_of_torch_npu_has_a_row() -> None:
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None and spec.origin is not None
    libraries = list(Path(spec.origin).parent.rglob("*.so"))
    linked = set().union(*(symbols(library, "--undefined-only") for library in libraries))
    linked &= symbols(SIMULATED, "--defined-only")
    assert "aclrtMalloc" in linked
    assert linked <= {*names(OURS), *names(TORCHS)}


def test_every_call_of_the_simulator_has_one_row() -> None:
    all_names = [name for section in (OURS, TORCHS, OTHERS) for name in names(section)]
    assert sorted(all_names) == sorted(symbols(SIMULATED, "--defined-only"))


def test_the_tests_that_it_names_are_there() -> None:
    for row in rows(OURS):
        if row[-1].strip() == "\N{EN DASH}":
            assert re.search("not enforced: |stricter|answered", row[-2]), row
            continue
        for part in row[-1].split(";"):
            file, _, tests = part.strip().partition(": ")
            text = (ROOT / "tests" / "sim" / f"test_sim_{file}.py").read_text()
            missing = [test for test in tests.split(", ") if f"def test_{test}(" not in text]
            assert not missing, f"{file}: {missing}"


SIZE, NONE = c_size_t(HUGE), c_size_t(0)
ADDRESS = 1 << 40  # unused
NULL_ARGUMENTS: list[tuple[Any, ...]] = [
    ("aclrtReserveMemAddress", None, SIZE, NONE, None, c_uint64(0)),
    ("aclrtReleaseMemAddress", None),
    ("aclrtMemGetAllocationGranularity", None, 0, byref(c_size_t())),
    ("aclrtMemGetAllocationGranularity", byref(prop()), 0, None),
    ("aclrtMallocPhysical", None, SIZE, byref(prop()), c_uint64(0)),
    ("aclrtMallocPhysical", byref(c_void_p()), SIZE, None, c_uint64(0)),
    ("aclrtFreePhysical", None),
    ("aclrtMapMem", None, SIZE, NONE, ADDRESS, c_uint64(0)),
    ("aclrtMapMem", ADDRESS, SIZE, NONE, None, c_uint64(0)),
    ("aclrtUnmapMem", None),
    ("aclrtGetMemInfo", HBM_MEM, None, byref(c_size_t())),
    ("aclrtGetMemUsageInfo", 0, None, c_size_t(1), byref(c_size_t())),
    ("aclrtMallocHost", None, SIZE),
    ("aclrtFreeHost", None),
    ("aclrtHostRegisterV2", None, c_uint64(HUGE), REGISTER_PINNED),
    ("aclrtHostUnregister", None),
    ("aclrtMemcpy", None, SIZE, ADDRESS, SIZE, HOST_TO_DEVICE),
    ("aclrtMemcpyAsync", ADDRESS, SIZE, None, SIZE, HOST_TO_DEVICE, None),
    ("aclrtGetDeviceCount", None),
    ("aclrtGetDevice", None),
    ("aclrtCreateContext", None, 0),
    ("aclrtDestroyContext", None),
    ("aclrtSetCurrentContext", None),
    ("aclrtGetCurrentContext", None),
    ("aclrtCreateStream", None),
    ("aclrtDestroyStream", None),
    ("aclrtStreamQuery", None, None),
    ("aclrtGetStreamAvailableNum", None),
    ("aclmdlRICaptureGetInfo", None, byref(c_int32()), None),
]
NO_SIZE: list[tuple[Any, ...]] = [
    ("aclrtReserveMemAddress", byref(c_void_p()), NONE, NONE, None, c_uint64(0)),
    ("aclrtMallocPhysical", byref(c_void_p()), NONE, byref(prop()), c_uint64(0)),
    ("aclrtMapMem", ADDRESS, NONE, NONE, ADDRESS, c_uint64(0)),
    ("aclrtMallocHost", byref(c_void_p()), NONE),
    ("aclrtHostRegisterV2", ADDRESS, c_uint64(0), REGISTER_PINNED),
]


@pytest.mark.parametrize("arguments", NULL_ARGUMENTS + NO_SIZE, ids=lambda each: each[0])
def test_null_arguments(arguments: tuple[Any, ...]) -> None:
    assert call(*arguments) == INVALID_PARAM
    assert arguments[0] in message()
