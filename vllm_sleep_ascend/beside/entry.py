# SPDX-License-Identifier: Apache-2.0
"""Gives an engine with sleep mode our worker."""

import importlib.util
import os
from functools import cache
from typing import Any

from vllm.logger import init_logger

from vllm_sleep_ascend.beside import IN_USE, NO_IMAGES, SWITCH, WORKER
from vllm_sleep_ascend.beside.seams import check_seams
from vllm_sleep_ascend.config import IMAGE_FORMAT, SleepModeConfig
from vllm_sleep_ascend.engine.checks import (
    check_door,
    check_engines,
    check_graphs,
    check_on_request,
)
from vllm_sleep_ascend.engine.kv_cache import check_connector

logger = init_logger(f"vllm.{__name__}")

_STOCK_WORKER = "vllm_ascend.worker.worker.NPUWorker"


def take_over(platform: Any) -> None:
    """Run our worker in engines with sleep mode that are configured from now on.

    Raises:
        ValueError: this package was installed without its compiled allocator.
        SeamError: this version of vllm-ascend or vLLM does not fit; nothing was changed.
    """
    if "check_and_update_config" in vars(platform):
        return
    if importlib.util.find_spec("vllm_sleep_ascend._camem") is None:
        raise ValueError(
            "vllm_sleep_ascend was installed without its compiled allocator; source CANN's "
            "set_env.sh and install it again with COMPILE_CUSTOM_KERNELS=1 pip install . "
            f"(COMPILE.md), or set {SWITCH}=0 to leave sleep mode to vllm-ascend"
        )
    check_seams()
    stock = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        stock(vllm_config)
        _choose_worker(vllm_config)

    platform.check_and_update_config = check_and_update_config


def _choose_worker(vllm_config: Any) -> None:
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model_config is not None:
        check_on_request(vllm_config)
    if model_config is None or not model_config.enable_sleep_mode or parallel.worker_cls == WORKER:
        return
    if parallel.worker_cls != _STOCK_WORKER:
        os.environ.pop(IN_USE, None)
        logger.warning(
            "Sleep mode is left to vllm-ascend: vllm_sleep_ascend supports the worker %s, and this "
            "engine uses %s.",
            _STOCK_WORKER,
            parallel.worker_cls,
        )
        return
    check_door(SleepModeConfig.from_vllm_config(vllm_config))
    if vllm_config.load_config.load_format == IMAGE_FORMAT:
        raise ValueError(f"load_format={IMAGE_FORMAT!r} is not supported with {NO_IMAGES}")
    check_engines(vllm_config)
    check_connector(vllm_config)
    check_graphs(vllm_config, recaptures=True)
    parallel.worker_cls = WORKER
    os.environ[IN_USE] = "1"
    guard()
    logger.info(
        "Sleep mode is provided by vllm_sleep_ascend; %s=0 leaves it to vllm-ascend.",
        SWITCH,
    )


@cache
def guard() -> None:
    """Install our checks of the engine's calls and the server's endpoints."""
    from vllm_sleep_ascend import patches

    patches.install_all()
