# SPDX-License-Identifier: Apache-2.0
"""Sleep mode beside vllm-ascend: its platform, workers and kernels with our allocator.

vLLM uses one platform. If vllm-ascend is installed, it is vllm-ascend's, and this package does
nothing until an engine with ``enable_sleep_mode`` is configured (see ``entry``).
"""

import os

SWITCH = "VLLM_SLEEP_ASCEND"
"""``VLLM_SLEEP_ASCEND=0`` leaves sleep mode to vllm-ascend."""

IN_USE = "_VLLM_SLEEP_ASCEND_IN_USE"
"""Tells an engine's processes that this package is in use. Not for users."""

PLATFORM = "vllm_ascend.platform"
WORKER = "vllm_sleep_ascend.beside.worker.SleepingNPUWorker"
TESTED = {"vllm_ascend": ("0.23.0", "0.23.0.post1"), "vllm": ("0.23.0",)}

NO_IMAGES = (
    "vllm-ascend, whose kernels keep weights in forms of their own; start from the checkpoint, or "
    "without vllm-ascend"
)
"""With what no image is saved, and no engine starts from one."""


def switched_off() -> bool:
    """Whether the user has turned this package off.

    Raises:
        ValueError: the switch is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(
            f"{SWITCH}={switch!r}: use 0 to leave sleep mode to vllm-ascend, 1 or unset otherwise"
        )
    return switch == "0"


def stand_by(platform: object) -> None:
    """Hook into vllm-ascend's platform, and do nothing until an engine uses sleep mode.

    vLLM calls the platform's ``is_sleep_mode_available`` only for such an engine.
    """
    if switched_off() or "is_sleep_mode_available" in vars(platform):
        return
    stock = platform.is_sleep_mode_available  # type: ignore[attr-defined]

    def is_sleep_mode_available() -> bool:
        from vllm_sleep_ascend.beside.entry import take_over

        take_over(platform)
        return stock()

    platform.is_sleep_mode_available = is_sleep_mode_available  # type: ignore[attr-defined]
    if os.environ.get(IN_USE) == "1":
        from vllm_sleep_ascend.beside.entry import guard

        guard()
