# SPDX-License-Identifier: Apache-2.0
"""Whether a front end lets a request pass to its engine."""

import time
from typing import TYPE_CHECKING

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.front_end.replicas import call_all

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_ATTRIBUTE = "sleep_mode_admission"


class Admission:
    """Asks an engine, before a request, whether it serves. An answer takes a step of the engine, so
    it is asked only when it may have changed: otherwise the engine itself says so, see
    ``refusals``. Requests that come before the answer ask as well."""

    def __init__(self, config: SleepModeConfig) -> None:
        self._acts = (
            config.wake_on_request
            or config.after_level2 != "warn"
            or config.while_asleep == "refuse"
        )
        self._wakes = config.wake_on_request
        self._idle_s = config.idle_sleep_s
        self._last_request = time.monotonic()
        self._is_unsure = True
        self._changes = 0

    @classmethod
    def of(cls, client: "AsyncLLM") -> "Admission":
        """That of this client, which keeps it as an attribute."""
        found: Admission | None = getattr(client, _ATTRIBUTE, None)
        if found is None:
            found = cls(SleepModeConfig.from_vllm_config(client.vllm_config))
            setattr(client, _ATTRIBUTE, found)
        return found

    def may_change(self) -> None:
        """Note a call that may keep the engine from serving, before it and after it."""
        self._is_unsure = True
        self._changes += 1

    async def refusal(self, client: "AsyncLLM") -> str | None:
        """Why this engine takes no request now; None if it does, or if no option refuses any. With
        ``wake_on_request`` it wakes before it answers."""
        now = time.monotonic()
        if self._idle_s is not None and now - self._last_request >= self._idle_s:
            self._is_unsure = True
        self._last_request = now
        if not self._acts or not self._is_unsure:
            return None
        if self._wakes and len(client.engine_core.core_engines) > 1:
            return None  # each data-parallel engine wakes, and answers, for its own requests
        seen = self._changes
        reasons = await call_all(client.engine_core, "sleep_mode_refusal")
        reason = next((reason for reason in reasons if reason), None)
        if reason is None and seen == self._changes:
            self._is_unsure = False
        return reason
