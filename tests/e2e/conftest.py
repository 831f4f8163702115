# SPDX-License-Identifier: Apache-2.0
"""Engines that tests share."""

import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

ONE_ENGINE = 40 << 20  # weights of a tiny model; of the last engine, vLLM may still hold some


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """The engines of a module give their memory back; none piles up."""
    yield
    gc.collect()
    if torch_npu := sys.modules.get("torch_npu"):
        torch_npu.npu.empty_cache()
    if camem := sys.modules.get("vllm_sleep_ascend._camem"):
        assert sum(found["bytes"] for found in camem.allocations()) < ONE_ENGINE


@pytest.fixture(scope="module")
def llm(tiny_model) -> Iterator[Any]:
    """An engine with sleep mode, in this process."""
    from engines import engine

    with engine(tiny_model, enable_sleep_mode=True) as llm:
        yield llm


@pytest.fixture(scope="session")
def server(tiny_model, tmp_path_factory, faults):
    """A server with sleep mode and the development endpoints, on a simulated NPU of its own.

    In float32: an interrupted request is computed again in one piece, whose sums in bfloat16 may
    round otherwise than those of its tokens one by one."""
    from server import HBM_GIB, MEMORY, SMALL, Server

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
