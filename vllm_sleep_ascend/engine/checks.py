# SPDX-License-Identifier: Apache-2.0
"""The input of sleep calls, against the engine's configuration."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_sleep_ascend import admin_key, policy
from vllm_sleep_ascend.config import SleepModeConfig, check_enabled

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")


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


def check_graphs(vllm_config: "VllmConfig", recaptures: bool = False) -> None:
    """Refuse released communicators with captured graphs, which hold the old communicators.

    Args:
        recaptures: with vllm-ascend's extra clean-up, the platform captures the graphs again.

    Raises:
        ValueError: communicators would be released while graphs that use them are kept.
    """
    if not SleepModeConfig.releases_communicators(vllm_config) or (
        recaptures and SleepModeConfig.cleans_up_extra(vllm_config)
    ):
        return
    if vllm_config.parallel_config.world_size == 1:
        logger.info("release_communicators has no effect: an engine with one rank has none.")
        return
    mode = vllm_config.compilation_config.cudagraph_mode
    if vllm_config.model_config.enforce_eager or mode.name == "NONE":
        return
    instead = (
        "or set vllm-ascend's enable_sleep_mode_extra_cleanup, which also captures the graphs "
        "again at each wake"
        if recaptures
        else "and the options that imply it (enable_nccl_comm_suspend, "
        "enable_sleep_mode_extra_cleanup)"
    )
    raise ValueError(
        "sleep mode with release_communicators and captured graphs (enforce_eager=False, "
        f"cudagraph_mode={mode.name}) is not supported: a graph would use communicators that no "
        "longer exist. Start with enforce_eager=True (--enforce-eager), or leave out "
        f"release_communicators, {instead}"
    )


def check_on_request(vllm_config: "VllmConfig") -> None:
    """
    Raises:
        ValueError: an option would put an engine to sleep, or wake it, that cannot decide alone.
    """
    config = SleepModeConfig.from_vllm_config(vllm_config)
    sleeps, moves = config.idle_sleep_s is not None, config.to_disk_after_s is not None
    if not (sleeps or moves or config.wake_on_request):
        return
    check_enabled(vllm_config)
    if vllm_config.parallel_config.distributed_executor_backend == "external_launcher":
        raise ValueError(
            "idle_sleep_s, wake_on_request and to_disk_after_s are not supported with "
            "external_launcher: the engine of each rank would decide alone; call sleep() and "
            "wake_up() on every rank"
        )


def check_door(config: SleepModeConfig) -> str | None:
    """The admin door's key, if there is a door and it has one.

    Raises:
        ValueError: the key cannot be read, or other machines reach a door without one.
    """
    if not config.has_door:
        return None
    key = admin_key.read(config.admin_key_file)
    if key is None and not config.door_is_local:
        raise ValueError(
            f"admin_host={config.admin_host!r} is reached by other machines, and there is no key: "
            f"set {admin_key.VARIABLE} in the environment, or admin_key_file; or leave out "
            "admin_host, for loopback alone"
        )
    return key


def check_sleep(
    vllm_config: "VllmConfig",
    level: object = 1,
    mode: object = "abort",
    to: object = None,
) -> None:
    """
    Raises:
        ValueError: level, mode or place does not exist, or the level needs sleep mode, or the place
            an option.
    """
    checked = policy.check_level(level)
    if checked > 0:
        check_enabled(vllm_config)
    policy.check_mode(mode)
    place = policy.check_place(to, checked)
    SleepModeConfig.from_vllm_config(vllm_config).check_place(place)


def check_wake_up(vllm_config: "VllmConfig", tags: list[str] | None = None) -> None:
    """
    Raises:
        ValueError: a tag does not exist, or names memory that cannot sleep.
    """
    if set(policy.check_tags(tags) or ()) - {policy.SCHEDULING_TAG}:
        check_enabled(vllm_config)
