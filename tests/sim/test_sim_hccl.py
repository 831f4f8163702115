# SPDX-License-Identifier: Apache-2.0
"""Communication between the processes of a simulated machine, through torch_npu and directly."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.ascendcl import MIB, message, ok
from helpers.patience import patience

RANK = ROOT / "tests" / "helpers" / "collectives.py"
SUCCESS, PARAMETER, POINTER, UNSUPPORTED, TIMEOUT, OUT_OF_MEMORY = 0, 1, 2, 5, 9, 24
FLOAT = 4


@contextmanager
def ranks(
    tmp_path: Path, check: str, world: int, *, devices: list[int] | None = None, **env: str
) -> Iterator[list[subprocess.Popen[str]]]:
    variables = {"NPU_SIM_DEVICES": "4", "HCCL_BUFFSIZE": "1", "OMP_NUM_THREADS": "1", **env}
    environment = {**os.environ, **variables}
    environment = {name: value for name, value in environment.items() if value}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", RANK, check, tmp_path / "store"),
                *(str(n) for n in (world, rank, rank if devices is None else devices[rank])),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run(tmp_path: Path, check: str, world: int, **options) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank."""
    with ranks(tmp_path, check, world, **options) as processes:
        results = []
        for process in processes:
            output, errors = process.communicate(timeout=90 * patience())
            results.append((process.returncode, output, errors))
        return results


@pytest.mark.parametrize(
    ("check", "world"),
    [
        ("results_equal_gloo,streams_order_the_work,in_a_graph,in_a_graph_that_is_refused", 2),
        ("results_equal_gloo,groups_split,sub_communicators", 4),
    ],
)
def test_between_processes(tmp_path, check: str, world: int) -> None:
    for code, _, errors in run(tmp_path, check, world):
        assert code == 0, errors


def test_a_graph_does_not_outlive_its_communicator(tmp_path: Path) -> None:
    for code, output, errors in run(tmp_path, "in_a_graph_of_a_destroyed_group", 2):
        assert (code, output) == (-signal.SIGABRT, "destroyed\n"), errors
        assert "device fault: a graph executes HcclAllReduce over communicator" in errors
        assert "which was destroyed" in errors


@pytest.mark.parametrize("check", ["counts_differ", "types_differ", "calls_differ"])
def test_ranks_that_differ_all_fail(tmp_path, check: str) -> None:
    results = run(tmp_path, check, 2)
    assert [code for code, _, _ in results] == [0, 0], results
    assert any("507018" in output for _, output, _ in results), results


def test_a_rank_that_dies_fails_the_others_at_once(tmp_path) -> None:
    results = run(tmp_path, "a_rank_dies", 4)
    assert [code for code, _, _ in results] == [0, 0, 0, -9], results


@pytest.mark.parametrize(("setting", "megabytes"), [("", 200), ("3", 4)])
def test_a_communicator_takes_device_memory(tmp_path, setting: str, megabytes: int) -> None:
    """Twice HCCL_BUFFSIZE (default 200), rounded up to the device's 2 MiB."""
    for code, output, errors in run(
        tmp_path, "buffers_are_device_memory", 2, HCCL_BUFFSIZE=setting
    ):
        assert code == 0, errors
        assert f"took {2 * megabytes * MIB}\n" in output, output


def test_two_ranks_on_one_device_are_refused(tmp_path) -> None:
    results = run(tmp_path, "buffers_are_device_memory", 2, devices=[1, 1])
    assert all(code == 1 for code, _, _ in results)
    assert any("use the same device" in errors for _, _, errors in results), results


@pytest.fixture
def hccl() -> ctypes.CDLL:
    return ctypes.CDLL("libhccl.so")


@pytest.fixture
def root_info(hccl) -> ctypes.Array:
    info = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(info) == SUCCESS
    return info


@pytest.fixture
def comm(hccl, root_info, monkeypatch) -> Iterator[ctypes.c_void_p]:
    """A communicator with one rank."""
    comm = ctypes.c_void_p()
    assert hccl.HcclCommInitRootInfo(1, root_info, 0, ctypes.byref(comm)) == SUCCESS
    yield comm
    assert hccl.HcclCommDestroy(comm) == SUCCESS
    assert hccl.HcclCommDestroy(comm) == PARAMETER


def test_bad_arguments_are_refused(hccl, comm) -> None:
    count, null = ctypes.c_uint64(4), None
    device = ctypes.c_void_p()
    ok("aclrtMalloc", ctypes.byref(device), ctypes.c_size_t(2 * MIB), 0)
    host = ctypes.create_string_buffer(64)
    reduce = hccl.HcclAllReduce
    assert reduce(device, device, count, FLOAT, 0, comm, null) == SUCCESS
    assert reduce(device, device, count, 99, 0, comm, null) == PARAMETER
    assert reduce(device, device, count, 10, 0, comm, null) == UNSUPPORTED  # float64
    assert reduce(device, device, count, 11, 1, comm, null) == UNSUPPORTED  # product of bf16
    assert reduce(null, device, count, FLOAT, 0, comm, null) == POINTER
    assert reduce(host, device, count, FLOAT, 0, comm, null) == 15  # host memory
    assert reduce(device, device, count, FLOAT, 0, host, null) == PARAMETER
    assert hccl.HcclBroadcast(device, count, FLOAT, 1, comm, null) == PARAMETER
    assert hccl.HcclSend(device, count, FLOAT, 0, comm, null) == PARAMETER
    assert hccl.HcclGroupEnd() == PARAMETER
    ok("aclrtSynchronizeDevice")
    ok("aclrtFree", device)


def test_no_communicator_without_its_ranks(hccl, root_info, monkeypatch) -> None:
    comm = ctypes.c_void_p()
    nonsense = ctypes.create_string_buffer(4108)
    assert hccl.HcclCommInitRootInfo(1, nonsense, 0, ctypes.byref(comm)) == PARAMETER
    assert hccl.HcclCommInitRootInfo(1, root_info, 1, ctypes.byref(comm)) == PARAMETER
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1")
    assert hccl.HcclCommInitRootInfo(2, root_info, 0, ctypes.byref(comm)) == TIMEOUT
    assert "1 of 2 ranks did not come" in message()


def test_no_communicator_without_memory(hccl, root_info, monkeypatch) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", "600")
    comm = ctypes.c_void_p()
    assert hccl.HcclCommInitRootInfo(1, root_info, 0, ctypes.byref(comm)) == OUT_OF_MEMORY
    assert "HCCL_BUFFSIZE" in message()


def test_three_pipeline_stages_share_a_communicator(tmp_path) -> None:
    """All three must take part to create it, otherwise they wait for each other."""
    options = {"P2P_HCCL_BUFFSIZE": "0", "HCCL_CONNECT_TIMEOUT": "10"}
    for code, _, errors in run(tmp_path, "stages_share_a_communicator", 3, **options):
        assert code == 0, errors
