# SPDX-License-Identifier: Apache-2.0
"""Sleep mode for vLLM on Ascend NPUs.

The functions below are this package's entry points. vLLM calls them in every process, so they
import nothing heavy before they know that they are needed.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

__version__ = "0.1.0"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def safe_while_asleep(function: _Function) -> _Function:
    """Decorator: a function, or a method of a worker extension, that touches neither weights nor KV
    cache. ``collective_rpc`` runs it also while the weights sleep."""
    function.safe_while_asleep = True  # type: ignore[attr-defined]
    return function


def register_platform() -> str | None:
    """``vllm.platform_plugins``: the platform class, or None where there is no NPU for us."""
    if importlib.util.find_spec("torch_npu") is None:
        return None
    plugins = os.environ.get("VLLM_PLUGINS")
    if importlib.util.find_spec("vllm_ascend") is not None and (
        plugins is None or "ascend" in plugins.split(",")
    ):
        return None  # vllm-ascend brings its own platform, and vLLM takes only one
    try:
        import torch_npu

        devices = torch_npu.npu.device_count()
    except Exception as error:
        # vLLM 0.33 logs what a plugin raises as a warning with its traceback.
        logger.warning("No NPU: torch_npu cannot be used (%s)", error)
        return None
    if devices == 0:
        return None
    return "vllm_sleep_ascend.native.platform.NPUPlatform"


def register_general() -> None:
    """``vllm.general_plugins``: the sleep-mode backend, and the checks in front of it."""
    from vllm.platforms import current_platform

    from vllm_sleep_ascend import beside

    if type(current_platform).__module__ == beside.PLATFORM:
        beside.stand_by(current_platform)
        return
    if importlib.util.find_spec("vllm.device_allocator.sleep_mode_backend") is None:
        return  # a vLLM that this package supports only beside vllm-ascend
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    if "camem" not in SleepModeBackendFactory._registry:
        SleepModeBackendFactory.register_backend(
            "camem", "vllm_sleep_ascend.memory.backend", "CamemBackend"
        )
    if type(current_platform).__module__ == "vllm_sleep_ascend.native.platform":
        from vllm_sleep_ascend import patches, weight_transfer

        patches.install_all()
        weight_transfer.register()
