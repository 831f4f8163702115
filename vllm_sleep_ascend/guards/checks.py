# SPDX-License-Identifier: Apache-2.0
"""The input of sleep calls, against the engine's configuration."""

from typing import Any

from vllm_sleep_ascend import policy


def check_enabled(vllm_config: Any) -> None:
    """
    Raises:
        ValueError: the engine was started without sleep mode.
    """
    if not vllm_config.model_config.enable_sleep_mode:
        raise ValueError(
            "sleep mode is not enabled; start the engine with LLM(..., enable_sleep_mode=True) or "
            "vllm serve --enable-sleep-mode"
        )


def check_sleep(vllm_config: Any, level: object = 1, mode: object = "abort") -> None:
    """
    Raises:
        ValueError: level or mode does not exist, or the level needs sleep mode.
    """
    if policy.check_level(level) > 0:
        check_enabled(vllm_config)
    policy.check_mode(mode)


def check_wake_up(vllm_config: Any, tags: list[str] | None = None) -> None:
    """
    Raises:
        ValueError: a tag does not exist, or names memory that cannot sleep.
    """
    if set(policy.check_tags(tags) or ()) - {policy.SCHEDULING_TAG}:
        check_enabled(vllm_config)
