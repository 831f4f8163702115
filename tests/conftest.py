# SPDX-License-Identifier: Apache-2.0
"""The simulated machine of a test run, and the models that tests share."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from support import make_model

# Before torch is imported. Engines run in this process unless a test says otherwise: the allocator
# can then be looked into.
os.environ.setdefault("NPU_SIM_DEVICES", "4")
os.environ.setdefault("NPU_SIM_HBM_GIB", "2")
os.environ.setdefault("HCCL_BUFFSIZE", "4")
os.environ.setdefault("NPU_SIM_MACHINE", f"pytest-{os.getpid()}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

# make test-ascend, in an environment of its own, runs these.
collect_ignore = [] if importlib.util.find_spec("vllm_ascend") else ["ascend"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines come last: one leaves a little of its memory behind (vLLM caches rotary tables for
    the life of a process), and tests of the allocator count every byte."""
    items.sort(key=lambda item: "e2e" in item.path.parts)


def pytest_sessionfinish() -> None:
    """Remove the simulated machines of this run; their names end with its process id."""
    for machine in Path("/dev/shm").glob(f"npu-sim-{os.getuid()}-*-{os.getpid()}"):
        shutil.rmtree(machine, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return make_model("tiny-qwen2")


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    """The file from which the shared server's simulated device reads its faults."""
    path = tmp_path_factory.mktemp("faults") / "rules"
    path.touch()
    return path


@pytest.fixture
def left_awake(server, faults):
    """Whatever the test did, the next one finds the server awake and its device in order."""
    from server import set_faults

    yield
    set_faults(faults, "")
    server.post("/wake_up")
    assert not server.is_sleeping()
