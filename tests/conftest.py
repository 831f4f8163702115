# SPDX-License-Identifier: Apache-2.0
"""The simulated machine of a test process, and shared fixtures."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers.models import make_model
from helpers.patience import patience

# Set before torch is imported. Engines run in this process unless a test says otherwise, so that
# tests can inspect the allocator.
os.environ.setdefault("NPU_SIM_DEVICES", "4")
os.environ.setdefault("NPU_SIM_HBM_GIB", "2")
os.environ.setdefault("HCCL_BUFFSIZE", "4")
if "PYTEST_XDIST_WORKER" in os.environ or "NPU_SIM_MACHINE" not in os.environ:
    os.environ["NPU_SIM_MACHINE"] = f"pytest-{os.getpid()}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Many processes share few processors, so waiting threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Processes started by tests can import the helpers.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
)

pytest_plugins = ["helpers.groups", "helpers.report"]

# make test-ascend runs these in a separate environment.
collect_ignore = [] if importlib.util.find_spec("vllm_ascend") else ["ascend"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: `make test` leaves it to `make test-slow`")
    config.addinivalue_line("markers", "long: a sweep, a soak or a load in full; see --long")
    os.environ.setdefault("TEST_PATIENCE", f"{patience():.1f}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionfinish() -> None:
    """Remove this run's simulated machines, whose names end with its process id."""
    if engine := sys.modules.get("helpers.engine"):
        engine.shared.close()
    for machine in Path("/dev/shm").glob(f"npu-sim-{os.getuid()}-*-{os.getpid()}"):
        shutil.rmtree(machine, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return make_model("tiny-qwen2")


@pytest.fixture(scope="session")
def expected(tiny_model: Path) -> list[list[int]]:
    """The result of ``few`` for an engine with the tiny model's weights."""
    from helpers.reference import hf_few

    return hf_few(tiny_model)


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the fault rules of the shared server's simulated device."""
    path = tmp_path_factory.mktemp("faults") / "rules"
    path.touch()
    return path


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the fault rules of an engine that a module starts in another process."""
    path = tmp_path_factory.mktemp("faults") / "rules"
    path.touch()
    return path


@pytest.fixture
def left_awake(server: Any, faults: Path) -> Iterator[None]:
    """After the test, the server is awake and its device has no faults."""
    from helpers.faults import set_faults

    yield
    set_faults(faults, "")
    server.post("/wake_up")
    assert not server.is_sleeping()
