# SPDX-License-Identifier: Apache-2.0
"""Loads the simulated device's operators when torch starts."""

import importlib.util
import os
from pathlib import Path


def load_operators() -> None:
    """Entry point of `torch.backends`. Does nothing unless the active toolkit has operators."""
    toolkit = os.environ.get("ASCEND_HOME_PATH")
    library = Path(toolkit or "") / "lib64" / "libnpu_sim_operators.so"
    if not toolkit or not library.exists():
        return
    import torch
    import torch_npu  # noqa: F401  registers the device for which the library has operators

    from vllm_sleep_ascend.sim import (
        absent_modules,
        imports,
        npu,
        torchvision_operators,
        triton_kernels,
        vllm_ascend_library,
    )

    torch.ops.load_library(str(library))
    npu.register(library)
    imports.hook({"torchvision": torchvision_operators.around_import})
    if importlib.util.find_spec("vllm_ascend") is not None:
        npu.define_vllm_ascend(library)
        absent_modules.install()
        vllm_ascend_library.install()
        imports.hook({"vllm_ascend.worker.block_table": triton_kernels.slot_mapping})
