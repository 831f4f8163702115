# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep doctor`` on simulated machines: its findings, and that it leaves nothing behind."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import GIB, MIB, ROOT
from helpers.ascendcl import run_python
from helpers.machine import LAUNCHER
from helpers.patience import patience

from vllm_sleep_ascend import beside
from vllm_sleep_ascend.doctor import acl, surroundings
from vllm_sleep_ascend.doctor.child import Child, Silence

MACHINE = f"doctor-{os.getpid()}"  # the session removes machines with this ending
TOTAL = 1 * GIB
SIZE = 32 * MIB
OPTIONS = ("--quiet", "--gib", str(SIZE / GIB), "--timeout", str(10 * patience()))


def environment(**variables: str) -> dict[str, str]:
    """The environment of an idle machine with two devices, plus these variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NPU_SIM_") or name == "NPU_SIM_HOME"
    }
    machine = {"NPU_SIM_MACHINE": MACHINE, "NPU_SIM_HBM_GIB": "1", "NPU_SIM_DEVICES": "2"}
    return {**kept, **machine, **variables}


def doctor(
    *arguments: str,
    code: int | None = 0,
    python: tuple[str, ...] = (sys.executable,),
    folder: Path = ROOT,
    before: Callable[[], object] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run it, and check its exit code unless that is None."""
    done = subprocess.run(
        [*python, "-m", "vllm_sleep_ascend.client.cli", "doctor", *OPTIONS, *arguments],
        cwd=folder,
        preexec_fn=before,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60 * patience(),
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def report(*arguments: str, **options: Any) -> dict[str, Any]:
    return json.loads(doctor(*arguments, "--json", **options).stdout)


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {name: probe["status"] for name, probe in found["probes"].items()}


def free_bytes(**variables: str) -> int:
    """Free bytes of the first device, seen from another process."""
    done = run_python("print(free_and_total()[0])", **environment(**variables))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name, size in (("model-1.safetensors", 3 * MIB), ("model-2.safetensors", MIB)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(9 * MIB))
    return tmp_path


ALL_PASS = dict.fromkeys(
    (
        *("map_at_offset", "map_again", "comes_free", "plain_copies", "page_locked", "registered"),
        *("page_locking", "streams", "deadlines", "speeds", "sleep_and_wake", "communicator"),
        "given_back",
    ),
    "pass",
)


def test_the_most_common_host(checkpoint):
    """Kernel 5.10: registered memory is not safe; everything else passes."""
    found = report("--model", str(checkpoint))
    assert statuses(found) == {**ALL_PASS, "registered": "degraded"}
    assert (found["verdict"], found["exit_code"], found["refusal"]) == ("usable", 0, "")
    assert (found["soc"], found["size_bytes"]) == ("Ascend910B2", SIZE)
    assert found["devices"] == [
        {"device": device, "free_bytes": TOTAL, "total_bytes": TOTAL} for device in (0, 1)
    ]
    figures = {name: probe["figures"] for name, probe in found["probes"].items()}
    assert figures["map_at_offset"] == {"granularity_bytes": 2 * MIB}
    assert figures["comes_free"]["taken_bytes"] == figures["comes_free"]["freed_bytes"] == SIZE
    copies = figures["page_locked"]
    assert copies["exact_to_device"] and copies["exact_to_host"] and copies["asynchronous"]
    assert figures["registered"] == {"kernel": "5.10.0", "used": False}
    assert "host_memory" in found["probes"]["registered"]["means"]
    assert figures["streams"] == {"left": 1983, "made": 6}
    measured = {(r["direction"], r["chunk_mib"], r["streams"]) for r in figures["speeds"]["all"]}
    assert measured == {
        (direction, chunk, streams)
        for direction in ("to_device", "to_host")
        for chunk in (2, 16)  # of 32 MiB
        for streams in (1, 2, 6)
    }
    assert figures["speeds"]["best"]["to_host"]["gb_per_s"] > 0
    slept = figures["sleep_and_wake"]
    assert slept["exact"] and slept["by"] == "the compiled allocator"
    assert slept["first_freed_bytes"] == slept["second_freed_bytes"] == SIZE
    assert slept["first_page_locked_bytes"] == slept["second_page_locked_bytes"] == SIZE
    assert figures["communicator"]["held_bytes"] == 2 * int(os.environ["HCCL_BUFFSIZE"]) * MIB
    assert figures["communicator"]["kept_bytes"] == 0

    around = found["surroundings"]
    assert around["kernel"]["figures"]["release"] == "5.10.0"
    assert around["cann"]["figures"]["version"] == "8.5.0"
    assert around["versions"]["figures"]["tested_together"] is True
    assert around["model"]["figures"]["weights_bytes"] == 4 * MIB
    assert around["host_memory"]["figures"]["available_bytes"] > GIB


@pytest.mark.parametrize("driver", ["25.0", "26.0"])
def test_a_newer_kernel_has_registered_memory(driver):
    """Its copies are exact, whether mlock or also the driver locks the pages."""
    found = report(NPU_SIM_KERNEL="6.1", NPU_SIM_DRIVER=driver)
    assert statuses(found)["registered"] == "pass"
    figures = found["probes"]["registered"]["figures"]
    assert figures["used"] and figures["exact_to_device"] and figures["exact_to_host"]
    assert figures["kernel"] == "6.1.0"
    assert statuses(found)["given_back"] == "pass"


@pytest.mark.parametrize("kernel", ["5.10", "6.1"])
@pytest.mark.parametrize(
    ("machine", "soc", "version", "left", "lacks", "remedy"),
    [
        (
            *({"NPU_SIM_CANN": "8.1"}, "Ascend910B2", "8.1.0", None),
            *("this CANN has no aclrtHostRegisterV2", "CANN has it from 8.5 on"),
        ),
        (
            *({"NPU_SIM_SOC": "310P"}, "Ascend310P3", "8.5.0", 1022),
            *("this chip has none: aclrtHostRegisterV2 failed with 207000", "No kernel brings it"),
        ),
    ],
    ids=["CANN 8.1", "310P"],
)
def test_where_nothing_can_be_registered_the_rest_holds(
    kernel, machine, soc, version, left, lacks, remedy
):
    """The doctor does not suggest a newer kernel if that would not help."""
    found = report(python=(*LAUNCHER, "python"), NPU_SIM_KERNEL=kernel, **machine)
    assert statuses(found) == {**ALL_PASS, "registered": "degraded"}
    registered = found["probes"]["registered"]
    assert registered["found"].startswith(lacks)
    assert "Nothing has to be done" in registered["remedy"] and remedy in registered["remedy"]
    assert "host with kernel" not in registered["remedy"]
    assert found["soc"] == soc
    assert found["surroundings"]["cann"]["figures"]["version"] == version
    assert found["probes"]["streams"]["figures"] == {"left": left, "made": 6}
    slept = found["probes"]["sleep_and_wake"]["figures"]
    assert slept["exact"] and slept["first_page_locked_bytes"] == SIZE


@pytest.mark.parametrize("left", [0, 2])
def test_few_streams_are_degraded(left):
    """One of them is the context's default stream."""
    found = report(code=None, NPU_SIM_STREAMS=str(left + 1))
    assert statuses(found)["streams"] == "degraded"
    assert found["probes"]["streams"]["figures"] == {"left": left, "made": left}
    used = {row["streams"] for row in found["probes"]["speeds"]["figures"]["all"]}
    assert used == ({1, 2} if left else {1})
    assert statuses(found)["page_locked"] == statuses(found)["given_back"] == "pass"


def test_no_stream_at_all_says_so():
    found = report(code=1, NPU_SIM_STREAMS="0")
    device = found["surroundings"]["device"]
    assert device["status"] == "fail"
    assert device["figures"] == {"call": "aclrtSetDevice", "code": 207005}
    assert set(statuses(found).values()) == {"not probed"}


def test_without_page_locked_memory_it_fails():
    found = report(code=1, NPU_SIM_FAULTS="aclrtMallocHost:1:207001:*")
    needs_it = ("page_locking", "deadlines", "speeds", "sleep_and_wake")
    assert statuses(found) == {
        **ALL_PASS,
        "registered": "degraded",
        "page_locked": "fail",
        **dict.fromkeys(needs_it, "not probed"),
    }
    failed = found["probes"]["page_locked"]
    assert failed["figures"] == {"call": "aclrtMallocHost", "code": 207001}
    assert "Free memory" in failed["remedy"]
    assert free_bytes() == TOTAL


@pytest.mark.parametrize(
    ("probe", "call"),
    [
        ("map_at_offset", "aclrtMapMem"),
        ("map_at_offset", "aclrtUnmapMem"),
        ("page_locked", "aclrtSynchronizeStream"),  # with the copy still in flight
    ],
)
def test_a_failing_call_is_named_and_leaves_no_memory_behind(probe, call):
    """The call fails from its second time on in each process, so cleaning up fails as well."""
    found = report(code=1, NPU_SIM_FAULTS=f"{call}:2:507899:*")
    failed = found["probes"][probe]
    assert (failed["status"], failed["figures"]) == ("fail", {"call": call, "code": 507899})
    assert statuses(found)["sleep_and_wake"] == "not probed"
    assert statuses(found)["given_back"] == "pass"
    assert free_bytes() == TOTAL


def test_a_copy_that_hangs_is_ended():
    rules = "aclrtMemcpyAsync.work:1:delay_ms=3600000:*"
    timeout = f"{2 + patience():g}"
    found = report("--timeout", timeout, code=1, NPU_SIM_FAULTS=rules)
    failed = found["probes"]["page_locked"]
    assert (failed["status"], failed["found"]) == ("fail", f"did not answer in {timeout} s")
    assert statuses(found)["streams"] == "pass"  # a new process goes on
    assert statuses(found)["given_back"] == "pass"
    assert free_bytes() == TOTAL


def test_a_crash_is_one_line():
    page = doctor(code=1, NPU_SIM_FAULTS="nonsense").stdout
    assert "the process ended with signal 6" in page
    assert "NPU_SIM_FAULTS is not understood" in page


def test_nothing_is_waited_for_beyond_the_latest_moment(monkeypatch):
    for name, value in environment(NPU_SIM_FAULTS="aclrtSetDevice:1:delay_ms=3600000:*").items():
        monkeypatch.setenv(name, value)
    with Child(latest=time.monotonic() + 1) as child:
        with pytest.raises(Silence):
            child.look(3600, device=0)
        with pytest.raises(Silence, match="did not answer in 0 s"):
            child.look(3600, device=0)


def sleep_and_wake(times: int = 1, before: str = "") -> list[dict[str, Any]]:
    """The probe's findings, in one process that closes its answers after each."""
    code = f"""
import json
from dataclasses import asdict
from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.doctor.child import Answers
{before}
answers = Answers()
for _ in range({times}):
    print(json.dumps(asdict(answers.probe("sleep_and_wake", 0, {SIZE}))))
    answers.close()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_second_sleep_has_page_locked_memory():
    """Even if the first one copied into plain memory, which is faster at first."""
    staging = (
        f"_camem.configure(chunk_bytes={2 * MIB}, keep_host_backup=True, copy_threads=3, "
        "host_threads=3, unprepared='stage')"
    )
    (finding,) = sleep_and_wake(before=staging)
    figures = finding["figures"]
    assert finding["status"] == "pass" and figures["exact"]
    assert figures["first_page_locked_bytes"] < SIZE
    assert figures["second_page_locked_bytes"] == SIZE


def test_the_device_is_not_reset_under_the_allocator():
    """The allocator keeps its streams, and continues to work."""
    findings = sleep_and_wake(times=2)
    assert [finding["status"] for finding in findings] == ["pass", "pass"]
    assert free_bytes() == TOTAL


@pytest.fixture
def hccl_without_memory(tmp_path) -> Path:
    """A folder with an HCCL whose communicators use no device memory."""
    source = tmp_path / "hccl.cpp"
    calls = ("GetRootInfo", "CommInitRootInfo", "AllReduce", "CommDestroy")
    source.write_text("".join(f'extern "C" int Hccl{call}() {{ return 0; }}\n' for call in calls))
    library = tmp_path / "libhccl.so"
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    return tmp_path


def test_a_communicator_without_memory_tells_nothing(hccl_without_memory):
    paths = f"{hccl_without_memory}:{os.environ['LD_LIBRARY_PATH']}"
    found = report(LD_LIBRARY_PATH=paths)
    communicator = found["probes"]["communicator"]
    assert communicator["status"] == "not probed"
    assert communicator["figures"] == {"held_bytes": 0, "kept_bytes": 0}
    assert "not known whether HCCL frees memory" in communicator["found"]
    assert found["verdict"] == "usable"


def little_to_lock() -> None:
    """Limit locked memory of the started process to 64 KiB, even for root."""
    import ctypes

    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
    drop, lock = 24, 14  # PR_CAPBSET_DROP, CAP_IPC_LOCK
    ctypes.CDLL(None).prctl(drop, lock, 0, 0, 0)


@pytest.mark.parametrize(("kernel", "status"), [("5.10", "info"), ("6.1", "degraded")])
def test_the_limit_of_locked_memory_is_held_against_the_model(checkpoint, kernel, status):
    """The limit matters only if registered memory is used."""
    options: dict[str, Any] = {"before": little_to_lock, "NPU_SIM_KERNEL": kernel}
    found = report("--model", str(checkpoint), **options)
    locked = found["surroundings"]["memlock"]
    assert (locked["status"], locked["figures"]) == (status, {"bytes": 1 << 16})
    assert statuses(found)["registered"] == "degraded"
    assert statuses(found)["sleep_and_wake"] == "pass"


@pytest.fixture
def neighbour() -> Iterator[None]:
    """Another process that holds a fifth of the first device."""
    code = f"ok('aclrtSetDevice', 0); mapped({TOTAL // 10 * 2 // (2 * MIB) * 2 * MIB})"
    code = f"{code}; print('there', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"from helpers.ascendcl import *\nimport sys\n{code}"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    yield
    process.communicate()


def test_a_device_in_use_is_refused_without_force(neighbour):
    refused = doctor(code=2)
    assert "refused: device 0 is in use: 0.80 of 1.00 GiB are free" in refused.stdout
    assert "--force" in refused.stdout and "Probes" not in refused.stdout
    assert report(code=2)["probes"] == {}
    assert statuses(report("--device", "1")) == {**ALL_PASS, "registered": "degraded"}
    before = free_bytes()
    assert statuses(report("--force")) == {**ALL_PASS, "registered": "degraded"}
    assert free_bytes() == before < TOTAL


WITHOUT_CANN = dict.fromkeys(("LD_LIBRARY_PATH", "ASCEND_HOME_PATH"), "")


def test_without_cann_every_line_has_a_remedy():
    page = doctor(code=1, ASCEND_TOOLKIT_HOME="", **WITHOUT_CANN).stdout
    assert re.search(r"fail +CANN +ASCEND_HOME_PATH is not set", page)
    assert re.search(r"fail +AscendCL +libascendcl.so: cannot open", page)
    assert re.search(r"not probed +all +AscendCL does not work", page)
    assert " ".join(page.split()).count("source CANN's set_env.sh") == 3
    assert "sleep mode cannot be used" in page.splitlines()[-1]


@pytest.mark.parametrize("visible", ["1,0", "0,0", "none"])
def test_a_list_of_devices_that_cann_refuses_is_named_with_its_remedy(visible):
    page = doctor(code=1, ASCEND_RT_VISIBLE_DEVICES=visible).stdout
    assert re.search(r"fail +AscendCL +no visible device", page)
    assert re.search(rf"degraded +ASCEND_RT_VISIBLE_DEVICES +{visible}: not numbers in asc", page)
    assert "Name each device once, in ascending order." in " ".join(page.split())


def test_a_bare_python_needs_nothing_installed(tmp_path):
    """Only the package, without the compiled allocator, its dependencies and HCCL."""
    shutil.copytree(
        ROOT / "vllm_sleep_ascend",
        tmp_path / "vllm_sleep_ascend",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    libraries = tmp_path / "lib64"
    libraries.mkdir()
    toolkit = Path(os.environ["ASCEND_HOME_PATH"])
    (libraries / "libascendcl.so").symlink_to(toolkit / "lib64" / "libascendcl.so")
    paths = {"PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": str(libraries)}
    found = report(code=1, python=(sys.executable, "-S"), folder=tmp_path, **paths)
    around = found["surroundings"]
    assert around["versions"]["status"] == around["allocator"]["status"] == "fail"
    assert "missing: vllm, torch, torch_npu" in around["versions"]["found"]
    assert "COMPILE_CUSTOM_KERNELS=1" in around["allocator"]["remedy"]
    expected = {**ALL_PASS, "registered": "degraded", "sleep_and_wake": "degraded"}
    assert statuses(found) == {**expected, "communicator": "not probed"}
    figures = found["probes"]["sleep_and_wake"]["figures"]
    assert figures["exact"] and figures["first_freed_bytes"] == SIZE


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--device", "2"), "there is no device 2; visible devices: 2"),
        (("--gib", "3"), "--gib 3 does not fit"),
        (("--model", "/nowhere"), "--model /nowhere is not a folder"),
    ],
)
def test_wrong_usage_names_the_value(arguments, problem):
    done = doctor(*arguments, code=2)
    assert problem in done.stderr and done.stdout == ""


def test_the_page_is_a_table_with_remedies_below():
    page = doctor(NPU_SIM_DEVICES="1").stdout.splitlines()
    rows = [line for line in page if re.match(r"  (-|pass|degraded) ", line)]
    titles = {re.match(r"  \S+ +", row).end() for row in rows}
    assert len(rows) > 25 and titles == {14}
    below = page[page.index("What it means, and what to do") :]
    assert below[1].startswith("  registered memory: Backups use memory from aclrtMallocHost")
    assert page[-1].startswith("sleep mode can be used: ")
    assert "1 degraded" in page[-1]


def test_the_tested_versions_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    given = dict(re.findall(r"^([A-Z_]+) := (\S+)$", makefile, re.M))

    def release(prefix: str) -> dict[str, str]:
        names = {"vllm": "VLLM", "torch": "TORCH", "torch_npu": "TORCH_NPU"}
        return {package: given[prefix + name] for package, name in names.items()}

    assert given["ASCEND_VLLM_ASCEND"] == beside.TESTED["vllm_ascend"][-1]
    assert (given["ASCEND_VLLM"],) == beside.TESTED["vllm"]
    with_ascend = [
        {**release("ASCEND_"), "vllm-ascend": version} for version in beside.TESTED["vllm_ascend"]
    ]
    assert (release(""), release("PREVIOUS_"), *with_ascend) == surroundings.TESTED


def test_every_call_is_one_of_the_headers():
    headers = Path(os.environ["ASCEND_HOME_PATH"], "include/acl").glob("*.h")
    text = re.sub(r"\s+", " ", " ".join(header.read_text() for header in headers))
    for name, parameters in (acl.FUNCTIONS | acl.OPTIONAL_FUNCTIONS).items():
        declared = re.search(rf"ACL_FUNC_VISIBILITY aclError {name}\(([^)]*)\)", text)
        assert declared, name
        assert len([p for p in declared[1].split(",") if p.strip()]) == len(parameters), name


UNKILLABLE = f"""#!{sys.executable}
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
any_process = ctypes.c_ulong(-1)
libc.prctl(0x59616D61, any_process, 0, 0, 0)  # PR_SET_PTRACER
if os.fork() == 0:
    traced = libc.ptrace(0x4206, os.getppid(), 0, 0) == 0  # PTRACE_SEIZE
    with open(os.environ["TRACER"], "w") as file:
        print(os.getpid(), traced, file=file)
time.sleep(3600)
"""


def test_an_npu_smi_that_cannot_be_killed_is_left_behind(tmp_path, monkeypatch):
    """A traced process cannot be reaped, like one that hangs in the driver."""
    tracer = tmp_path / "tracer"
    (tmp_path / "npu-smi").write_text(UNKILLABLE)
    (tmp_path / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRACER", str(tracer))
    finding = surroundings.driver(tmp_path / "none")
    pid, traced = tracer.read_text().split()
    os.kill(int(pid), signal.SIGKILL)
    if traced == "False":
        pytest.skip("processes must not trace others here")
    assert finding.status == "degraded" and finding.figures["version"] is None
    assert finding.found == "npu-smi info did not end in 5 s"


def test_pages_of_64_kib_are_told():
    assert surroundings.page_size(4096).found == "4096 bytes"
    assert "65536 bytes: a huge page has 512 MiB" in surroundings.page_size(1 << 16).found


@pytest.mark.parametrize(
    ("file", "line", "version"),
    [
        ("x86_64-linux/ascend_toolkit_install.info", "version=8.2.RC1", "8.2.RC1"),
        ("version.cfg", "toolkit_running_version=[7.6.0.1.220:8.0.0]", "8.0.0"),
        ("version.cfg", "runtime_running_version=[1.83.T8.0.B128:CANN-1.83]", "1.83.T8.0.B128"),
        ("runtime/version.info", "Version=7.6.0.1.220", "7.6.0.1.220"),
    ],
)
def test_the_version_of_cann_is_found(tmp_path, monkeypatch, file, line, version):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"# a comment\n{line}\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert surroundings.cann().figures["version"] == version


def test_the_version_of_the_driver_is_found(tmp_path):
    file = tmp_path / "version.info"
    file.write_text("Version=24.1.rc3\nascendhal_version=7.35.23\n")
    assert surroundings.driver(file).figures["version"] == "24.1.rc3"
    assert surroundings.driver(tmp_path / "none").figures["version"] is None
