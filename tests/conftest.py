# SPDX-License-Identifier: Apache-2.0
"""The simulated machine of a test process, what tests share, and how they share two processors."""

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

# Before torch is imported. Engines run in this process unless a test says otherwise: the allocator
# can then be looked into.
os.environ.setdefault("NPU_SIM_DEVICES", "4")
os.environ.setdefault("NPU_SIM_HBM_GIB", "2")
os.environ.setdefault("HCCL_BUFFSIZE", "4")
if "PYTEST_XDIST_WORKER" in os.environ or "NPU_SIM_MACHINE" not in os.environ:
    os.environ["NPU_SIM_MACHINE"] = f"pytest-{os.getpid()}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Several processes compute at once on few processors: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Processes that tests start find the helpers, and import what they are sent by name.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
)

pytest_plugins = ["helpers.report"]

# make test-ascend, in an environment of its own, runs these.
collect_ignore = [] if importlib.util.find_spec("vllm_ascend") else ["ascend"]

# With two processes: the files that take longest begin first, so that both end together.
LONGEST = (
    "tests/sim/test_simulator.py",
    "tests/allocator/test_faults.py",
    "tests/e2e/ranks/test_parallel.py",
    "tests/e2e/ranks/test_data_parallel.py",
    "tests/e2e/proxy",
    "tests/e2e/guides/test_experiments.py",
    "tests/e2e/guides/test_examples.py",
    "tests/e2e/ranks/test_communicators.py",
    "tests/e2e/server/test_server.py",
    "tests/e2e/ranks/test_ray.py",
    "tests/e2e/engine/test_pause_modes.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="run also the tests marked long, which are left out"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: a sweep, a soak or a load in full; see --long")
    os.environ.setdefault("TEST_PATIENCE", f"{patience():.1f}")


def group_of(nodeid: str) -> str:
    """Tests of a group run one after the other in one process, as they share what is costly: those
    of a file, and all of the proxy, which share its servers."""
    file = nodeid.partition("::")[0]
    return "tests/e2e/proxy" if file.startswith("tests/e2e/proxy/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # as collected
    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    first = {group: number for number, group in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple:
        # Engines leave a little of their memory behind, and tests of the allocator count it all.
        return "e2e" in item.path.parts, first.get(group_of(item.nodeid), len(first))

    items.sort(key=place)


def pytest_sessionfinish() -> None:
    """Remove the simulated machines of this run; their names end with its process id."""
    if engine := sys.modules.get("helpers.engine"):
        engine.shared.close()
    for machine in Path("/dev/shm").glob(f"npu-sim-{os.getuid()}-*-{os.getpid()}"):
        shutil.rmtree(machine, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return make_model("tiny-qwen2")


@pytest.fixture(scope="session")
def expected(tiny_model: Path) -> list[list[int]]:
    """What ``few`` gives of an engine with the weights of the tiny model."""
    from helpers.reference import hf_few

    return hf_few(tiny_model)


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file from which the shared server's simulated device reads its faults."""
    path = tmp_path_factory.mktemp("faults") / "rules"
    path.touch()
    return path


@pytest.fixture
def left_awake(server: Any, faults: Path) -> Iterator[None]:
    """Whatever the test did, the next one finds the server awake and its device in order."""
    from helpers.faults import set_faults

    yield
    set_faults(faults, "")
    server.post("/wake_up")
    assert not server.is_sleeping()
