# SPDX-License-Identifier: Apache-2.0
"""The input of sleep calls, against the engine's configuration."""

from typing import TYPE_CHECKING

from vllm_sleep_ascend import policy
from vllm_sleep_ascend.config import check_enabled

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_engines(vllm_config: "VllmConfig") -> None:
    """Engines that share experts take every step together, and resume with a blocking all-reduce:
    one that stays asleep after a failure holds up the others.

    Raises:
        ValueError: a mixture of experts, data parallel.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    engines = parallel.data_parallel_size
    if model.is_moe and engines > 1:
        raise ValueError(
            f"sleep mode of a mixture of experts ({model.model}) with data_parallel_size={engines} "
            "is not supported: its engines compute every step together, and one that fails to "
            "sleep or to wake would stop the others for good; start a server of its own for each "
            f"engine (data_parallel_size=1), or use tensor parallelism (tensor_parallel_size="
            f"{engines * parallel.tensor_parallel_size}), or leave out enable_sleep_mode"
        )


def check_sleep(vllm_config: "VllmConfig", level: object = 1, mode: object = "abort") -> None:
    """
    Raises:
        ValueError: level or mode does not exist, or the level needs sleep mode.
    """
    if policy.check_level(level) > 0:
        check_enabled(vllm_config)
    policy.check_mode(mode)


def check_wake_up(vllm_config: "VllmConfig", tags: list[str] | None = None) -> None:
    """
    Raises:
        ValueError: a tag does not exist, or names memory that cannot sleep.
    """
    if set(policy.check_tags(tags) or ()) - {policy.SCHEDULING_TAG}:
        check_enabled(vllm_config)
