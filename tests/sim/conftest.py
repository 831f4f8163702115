# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of the simulator, which need a separate process and machine.

A run of only this folder under `npu-sim` is that process. In any other run, one test starts that
process and stands for all of them.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.ascendcl import Mapped

HERE = Path(__file__).parent
MACHINE = {
    "NPU_SIM_MACHINE": f"sim-tests-{os.getpid()}",
    "NPU_SIM_HBM_GIB": "1",
    "NPU_SIM_DEVICES": "2",
}


def is_own_process(config: pytest.Config) -> bool:
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return all(path.is_relative_to(HERE) for path in paths)


def pytest_configure(config: pytest.Config) -> None:
    if not is_own_process(config):
        return
    for name in [name for name in os.environ if name.startswith("NPU_SIM_")]:
        if name != "NPU_SIM_HOME":
            del os.environ[name]
    os.environ.pop("ASCEND_RT_VISIBLE_DEVICES", None)
    os.environ.update(MACHINE)


def pytest_unconfigure(config: pytest.Config) -> None:
    if is_own_process(config):
        state = f"/dev/shm/npu-sim-{os.getuid()}-{MACHINE['NPU_SIM_MACHINE']}"
        shutil.rmtree(state, ignore_errors=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.name == "test_simulator.py":
        return is_own_process(config) or None
    if collection_path.name.startswith("test_sim_"):
        return not is_own_process(config) or None
    return None


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Device 0 in this thread. The test must free everything that it allocates."""
    if request.path.name == "test_simulator.py":
        yield
        return
    from helpers import ascendcl

    from vllm_sleep_ascend.sim import control

    ascendcl.ok("aclrtSetDevice", 0)
    before = control.counters()
    yield
    control.set_faults("")
    ascendcl.ok("aclrtSetDevice", 0)
    assert control.counters() == before


# The library exists only under `npu-sim`, so the fixtures import what needs it.


@pytest.fixture
def queue() -> Iterator[int]:
    """A stream. The fixture ends its capture, and checks that no stream of the device is lost."""
    from helpers import ascendcl, captures

    left = ascendcl.streams_left()
    handle = ascendcl.stream()
    yield handle
    captures.exchange(captures.GLOBAL)
    if captures.info(handle)[0] != captures.NONE and (graph := captures.end(handle)[1]):
        captures.destroy(graph)
    ascendcl.ok("aclrtDestroyStream", handle)
    assert ascendcl.streams_left() == left


@pytest.fixture
def other() -> Iterator[int]:
    """Another stream."""
    from helpers import ascendcl

    handle = ascendcl.stream()
    yield handle
    ascendcl.ok("aclrtSynchronizeStream", handle)
    ascendcl.ok("aclrtDestroyStream", handle)


@pytest.fixture
def memory() -> "Iterator[Mapped]":
    """Device memory. Tests request it before the streams that use it, which then end first."""
    from helpers import ascendcl

    block = ascendcl.mapped()
    yield block
    block.free()


@pytest.fixture
def host() -> Iterator[int]:
    """Page-locked memory."""
    from helpers import ascendcl

    address = ascendcl.malloc_host(ascendcl.HUGE)
    yield address
    ascendcl.ok("aclrtFreeHost", address)
