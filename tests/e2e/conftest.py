# SPDX-License-Identifier: Apache-2.0
"""The shared engine and the shared server."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import MIB, warm

# Modules that a loader imports make constants among the weights: a device page of 2 MiB for each.
CONSTANTS = 8 * MIB


def pytest_collection_finish(session: pytest.Session) -> None:
    warm.start()


@pytest.fixture(autouse=True)
def forgotten(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """pytest refers to an engine through a test's fixtures and logged exceptions; here until the
    test has ended, and not until the module has."""
    yield
    request.node.funcargs.clear()
    for phase in ("setup", "call"):
        caplog.get_records(phase).clear()


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """The engines of a module free their memory."""
    yield
    while gc.collect():  # a tensor that C++ also refers to takes two passes
        pass
    if torch_npu := sys.modules.get("torch_npu"):
        torch_npu.npu.empty_cache()
    camem, engines = map(sys.modules.get, ("vllm_sleep_ascend._camem", "helpers.engine"))
    if camem and not (engines and engines.shared.is_open()):
        assert sum(found["bytes"] for found in camem.allocations()) <= CONSTANTS


@pytest.fixture(scope="session")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    from helpers.models import other_weights

    return other_weights(tiny_model, tmp_path_factory.mktemp("other") / "model")


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[Any]:
    """The shared engine with sleep mode in this process, woken after the test."""
    from helpers.engine import shared

    from vllm_sleep_ascend.sim import control

    llm = shared.get(tiny_model, enable_sleep_mode=True)
    yield llm
    control.set_faults("")
    llm.wake_up()
    assert not llm.llm_engine.is_sleeping()
    assert not llm.llm_engine.has_unfinished_requests()
    llm.reset_prefix_cache()


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, faults: Path):
    """A server with sleep mode and the development endpoints, on its own simulated NPU.

    It uses float32: an interrupted request is computed again in one prefill, which in bfloat16 may
    round differently from single tokens.
    """
    from helpers.server import HBM_GIB, MEMORY, SMALL, Server

    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NPU_SIM_MACHINE": f"server-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
        "NPU_SIM_FAULTS_FILE": str(faults),
    }
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--enable-sleep-mode", "--dtype", "float32", *SMALL, *MEMORY)
    with Server(tiny_model, *options, log=log, env=env) as server:
        yield server
