# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend on the simulated NPU, set up before vLLM is imported."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("VLLM_ASCEND_ENABLE_NZ", "0")  # as its guide to sleep mode sets it
# Real NPU attention has no float32, but the tokens of 16-bit engines differ from another
# implementation's if two logits are nearly equal. Nor does it take a small model's heads.
os.environ.setdefault("NPU_SIM_LAX_ATTENTION", "1")
# Its compiler is made for torch 2.10; torch 2.13 refuses to cache the graphs that it returns.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
os.environ.setdefault("VLLM_DISABLE_COMPILE_CACHE", "1")


@pytest.fixture(scope="module")
def sleeper(tiny_model) -> Iterator[Any]:
    """An engine with sleep mode in this process."""
    from helpers.ascend_engine import engine

    options = {"sleep_mode": {"preserve_parameters": ["model.layers.0.*_layernorm.weight"]}}
    with engine(tiny_model, enable_sleep_mode=True, additional_config=options) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory, faults) -> Iterator[Any]:
    """A server with sleep mode and the development endpoints, on its own simulated NPU."""
    from helpers.server import HBM_GIB, MEMORY, SMALL, Server

    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",  # has to be off inside the pools
        "NPU_SIM_MACHINE": f"ascend-server-{os.getpid()}",
        "NPU_SIM_HBM_GIB": str(HBM_GIB),
        "NPU_SIM_FAULTS_FILE": str(faults),
    }
    log = tmp_path_factory.mktemp("server") / "log"
    eager = ("--enforce-eager", "--dtype", "float32")
    options = ("--enable-sleep-mode", *eager, *SMALL, *MEMORY)
    with Server(tiny_model, *options, log=log, env=env) as server:
        yield server
