# SPDX-License-Identifier: Apache-2.0
"""A server of the proxy whose ranks say what a test wants."""

from typing import Any

from vllm_sleep_ascend.client.sleep_client import SleepClient


class Tells(SleepClient):
    """Answers with ``said``, or raises it if it is an error; ``asked``: how often it was asked."""

    def __init__(self, said: Any) -> None:
        super().__init__("http://127.0.0.1:1")
        self.said, self.asked = said, 0

    async def ranks(self, timeout_s: float | None = None) -> Any:
        self.asked += 1
        if isinstance(self.said, Exception):
            raise self.said
        return self.said
