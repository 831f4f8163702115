# SPDX-License-Identifier: Apache-2.0
"""vLLM's version of the weights, in the engine's process: that of the weights loaded last.

Stock vLLM keeps the last version that was set, even if other weights are loaded afterwards.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_sleep_ascend.status import WeightsReport

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

_UNKNOWN = "unknown"


def follow(core: "EngineCore", contents: list[WeightsReport]) -> None:
    """Set the version that the ranks report in their ``weights_content``."""
    if hasattr(core, "_weight_version"):
        versions = {content["version"] for content in contents}
        core._weight_version = versions.pop() if len(versions) == 1 else _UNKNOWN


def set_weight_version(
    stock: Callable[["EngineCore", str], None],
) -> Callable[["EngineCore", str], None]:
    def set_weight_version(self: "EngineCore", weight_version: str) -> None:
        if _sleeps(self):
            self.model_executor.collective_rpc("set_weight_version", args=(weight_version,))
        stock(self, weight_version)

    return set_weight_version


def get_weight_version(stock: Callable[["EngineCore"], str]) -> Callable[["EngineCore"], str]:
    def get_weight_version(self: "EngineCore") -> str:
        if _sleeps(self):
            follow(self, self.model_executor.collective_rpc("weights_content"))
        return stock(self)

    return get_weight_version


def _sleeps(core: "EngineCore") -> bool:
    return core.vllm_config.model_config.enable_sleep_mode
