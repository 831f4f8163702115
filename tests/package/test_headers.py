# SPDX-License-Identifier: Apache-2.0
"""csrc/ compiles with the headers of CANN 8.1, and links only what CANN 8.1 has.

CANN 8.1's headers are not available here. The current ones are used instead, with every AscendCL
name that is not in cann_8_1.txt renamed.
"""

import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
from helpers import ROOT

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.doctor import acl

HEADERS = Path(os.environ["ASCEND_HOME_PATH"], "include")
SOURCES = sorted(
    path for path in (ROOT / "csrc").rglob("*.cpp") if ROOT / "csrc" / "sim" not in path.parents
)
NAME = re.compile(r"\b(?:acl|ACL_)\w+")
CANN_8_1 = {
    line
    for line in (Path(__file__).parent / "cann_8_1.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def without_newer_names(line: str) -> str:
    if line.lstrip().startswith("#include"):
        return line
    return NAME.sub(lambda name: name[0] if name[0] in CANN_8_1 else f"newer_{name[0]}", line)


@pytest.fixture(scope="module")
def old_headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("include")
    for header in (HEADERS / "acl").rglob("*.h"):
        copy = folder / header.relative_to(HEADERS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        lines = header.read_text().splitlines(keepends=True)
        copy.write_text("".join(map(without_newer_names, lines)))
    return folder


def errors_of(source: Path, headers: Path) -> str:
    folders = (headers, pybind11.get_include(), sysconfig.get_path("include"))
    done = subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
        + [f"-isystem{folder}" for folder in folders]
        + [str(source)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == ("error:" not in done.stderr), done.stderr
    return done.stderr if done.returncode else ""


def test_every_source_compiles_with_the_names_of_cann_8_1(old_headers):
    with ThreadPoolExecutor(2) as pool:
        errors = pool.map(lambda source: errors_of(source, old_headers), SOURCES)
    assert len(SOURCES) > 10 and "".join(errors) == ""


def test_a_newer_name_does_not(old_headers, tmp_path):
    source = tmp_path / "newer.cpp"
    source.write_text(
        "#include <acl/acl.h>\n"
        "aclrtMemUsageInfo usage;\n"
        "auto lock(void* p) { return aclrtHostRegisterV2(p, 4096, ACL_HOST_REG_PINNED); }\n"
    )
    assert errors_of(source, HEADERS) == ""
    errors = errors_of(source, old_headers)
    for name in ("aclrtMemUsageInfo", "aclrtHostRegisterV2", "ACL_HOST_REG_PINNED"):
        assert re.search(rf"error: .{name}. (does not name a type|was not declared)", errors), name


def test_the_allocator_links_functions_of_cann_8_1_alone():
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", _camem.__file__],
        check=True,
        capture_output=True,
        text=True,
    )
    linked = set(NAME.findall(symbols.stdout))
    assert "aclrtMapMem" in linked and linked <= CANN_8_1


def test_the_doctor_requires_functions_of_cann_8_1_alone():
    assert acl.FUNCTIONS.keys() <= CANN_8_1


def test_the_simulated_cann_8_1_lacks_what_is_newer():
    optional = (ROOT / "csrc" / "ascendcl" / "optional.cpp").read_text()
    looked_up = re.findall(r'lookup<\w+>\("(\w+)"\)', optional)
    newer = {*looked_up, *acl.OPTIONAL_FUNCTIONS} - CANN_8_1
    hidden = set(NAME.findall((ROOT / "csrc" / "sim" / "cann_8_1.map").read_text()))
    assert "aclrtHostRegisterV2" in newer and newer <= hidden
    assert not hidden & CANN_8_1


def test_every_return_code_has_the_name_that_the_headers_give_it():
    declared = {
        int(code): name
        for file in ("error_codes/rt_error_codes.h", "acl_base_rt.h")
        for name, code in re.findall(
            r"^(?:#define|static const int)\s+(ACL_ERROR_\w+)[\s=]+(\d+)",
            (HEADERS / "acl" / file).read_text(),
            re.MULTILINE,
        )
        if code != "0"
    }
    assert len(declared) > 200
    table = re.findall(
        r'\{(\d+), "(\w+)"\}', (ROOT / "csrc" / "ascendcl" / "codes.cpp").read_text()
    )
    assert {int(code): name for code, name in table} == declared
    assert acl.NAMES.items() <= declared.items()


def test_every_name_of_the_list_is_one_of_the_headers():
    text = "".join(header.read_text() for header in (HEADERS / "acl").rglob("*.h"))
    assert set(NAME.findall(text)) >= CANN_8_1


def test_what_older_headers_lack_is_what_newer_ones_declare(tmp_path):
    source = tmp_path / "same.cpp"
    source.write_text(
        """
        #include <type_traits>
        #include "ascendcl/newer.h"
        using namespace camem;
        static_assert(kBadAlloc == ACL_ERROR_BAD_ALLOC);
        static_assert(kMemoryAllocation == ACL_ERROR_RT_MEMORY_ALLOCATION);
        static_assert(kDeviceOom == ACL_ERROR_RT_DEVICE_OOM);
        static_assert(kStreamSyncTimeout == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT);
        static_assert(kHostRegisterPinned == ACL_HOST_REG_PINNED);
        static_assert(sizeof(MemUsageInfo) == sizeof(aclrtMemUsageInfo));
        #define SAME(ours, theirs) \\
          static_assert(offsetof(MemUsageInfo, ours) == offsetof(aclrtMemUsageInfo, theirs)); \\
          static_assert(std::is_same_v<decltype(MemUsageInfo::ours), \\
                                       decltype(aclrtMemUsageInfo::theirs)>)
        SAME(name, name);
        SAME(current, curMemSize);
        SAME(peak, memPeakSize);
        SAME(reserved, reserved);
        template <typename Function> struct Parameters;
        template <typename R, typename A, typename B, typename... Rest>
        struct Parameters<R (*)(A, B*, Rest...)> { using Others = R (*)(A, Rest...); };
        static_assert(std::is_same_v<Parameters<GetMemUsageInfo>::Others,
                                     Parameters<decltype(&aclrtGetMemUsageInfo)>::Others>);
        static_assert(std::is_same_v<GetStreamAvailableNum, decltype(&aclrtGetStreamAvailableNum)>);
        static_assert(std::is_same_v<HostRegisterV2, decltype(&aclrtHostRegisterV2)>);
        static_assert(std::is_same_v<HostUnregister, decltype(&aclrtHostUnregister)>);
        """
    )
    assert errors_of(source, HEADERS) == ""
