# SPDX-License-Identifier: Apache-2.0
"""The engine and the server that tests share."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import MIB, warm

ONE_ENGINE = 40 * MIB  # weights of a tiny model; of the last engine, vLLM may still hold some


def pytest_collection_finish(session: pytest.Session) -> None:
    warm.start()


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """The engines of a module give their memory back; none piles up."""
    yield
    gc.collect()
    if torch_npu := sys.modules.get("torch_npu"):
        torch_npu.npu.empty_cache()
    camem, engines = map(sys.modules.get, ("vllm_sleep_ascend._camem", "helpers.engine"))
    if camem and not (engines and engines.shared.is_open()):
        assert sum(found["bytes"] for found in camem.allocations()) < ONE_ENGINE


@pytest.fixture(scope="session")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    from helpers.models import other_weights

    return other_weights(tiny_model, tmp_path_factory.mktemp("other") / "model")


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[Any]:
    """The shared engine with sleep mode, in this process; awake again when the test is over."""
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
    """A server with sleep mode and the development endpoints, on a simulated NPU of its own.

    In float32: an interrupted request is computed again in one piece, whose sums in bfloat16 may
    round otherwise than those of its tokens one by one."""
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
