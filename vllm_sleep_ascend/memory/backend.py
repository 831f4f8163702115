# SPDX-License-Identifier: Apache-2.0
"""``camem``: vLLM's SleepModeBackend on top of the compiled allocator.

vLLM 0.23 has no such interface: there our worker calls the class itself.
"""

from typing import Literal

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.memory.sleeping_memory import SleepingMemory
from vllm_sleep_ascend.policy import DEFERRABLE_TAGS, POLICY, Place

try:
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
except ImportError:
    SleepModeBackend = object  # type: ignore[assignment,misc]


class CamemBackend(SleepingMemory, SleepModeBackend):
    """An engine's memory, by vLLM's levels and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.configure(SleepModeConfig())

    def suspend(self, level: int = 1, place: Place | None = None) -> None:
        """Free the device memory of every tag, by the policy of ``level`` (1 or 2). With ``place``
        backups go there, also those of memory that sleeps already."""
        self.sleep(f"sleep level {level}", POLICY[level], place=place)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Free the device memory of these tags and discard its content; keep all others."""
        self.sleep(f"discard {', '.join(tags)}", dict.fromkeys(tags, "discard"), "keep")

    def resume(self, tags: list[str] | None = None) -> None:
        """Restore these tags and every tag that cannot be deferred; None restores all."""
        deferred = set() if tags is None else set(DEFERRABLE_TAGS) - set(tags)
        self.wake([tag for tag in self.tags() if tag not in deferred])

    def state(self) -> Literal["RUNNING", "SUSPENDED"]:
        """SUSPENDED while any of the engine's memory sleeps, otherwise RUNNING."""
        return "SUSPENDED" if any(map(self.asleep, self.tags())) else "RUNNING"

    @classmethod
    def is_supported(cls) -> bool:
        return True

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        return True
