# SPDX-License-Identifier: Apache-2.0
"""Imports of the fork server: everything slow that servers, engines and ranks import.

These imports must not call AscendCL: a fork could not use the device, and the simulator would keep
the settings of this process.
"""

import gc
import sys
from importlib import import_module
from unittest import mock

import setproctitle
import torch  # noqa: F401  loads torch_npu and the device's operators in their order
import torch_npu
import vllm.platforms

from helpers.warm import spawning
from vllm_sleep_ascend.native.platform import NPUPlatform

_MODULES = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.collect_env",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm_sleep_ascend.engine",
    "vllm_sleep_ascend.native.attention.backend",
    "vllm_sleep_ascend.native.model_runner",
    "vllm_sleep_ascend.front_end.endpoints",
    "vllm_sleep_ascend.native.worker",
    "helpers.warm.command",
)

# vLLM and transformers query devices on import. They get fixed answers, and each process detects
# its platform again.
vllm.platforms._current_platform = NPUPlatform()
with (
    mock.patch.object(torch_npu.npu, "is_available", return_value=True),
    mock.patch.object(torch_npu.npu, "device_count", side_effect=AssertionError("a device call")),
):
    for _name in _MODULES:
        import_module(_name)
vllm.platforms._current_platform = None

setproctitle.getproctitle()  # must run before the environment changes
spawning.install()
gc.freeze()  # so that forks share these objects' pages

assert "vllm_sleep_ascend._camem" not in sys.modules, "the allocator does not survive a fork"
