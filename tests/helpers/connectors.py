# SPDX-License-Identifier: Apache-2.0
"""KV connectors that keep blocks in a folder: vLLM's example, and one that can empty it."""

import shutil
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class EmptiedConnector(ExampleConnector):
    """vLLM's example with what it lacks: its store can be emptied."""

    def reset_cache(self) -> bool:
        for folder in Path(self._storage_path).iterdir():
            shutil.rmtree(folder)
        return True


class RegisteringConnector(EmptiedConnector):
    """As one that moves blocks by their registered addresses."""

    def register_kv_caches(self, kv_caches: dict) -> None:
        self._addresses = [cache.data_ptr() for cache in kv_caches.values()]


class HeadMajorConnector(EmptiedConnector):
    """As NIXL's, which asks for a layout that it moves faster."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: object) -> str | None:
        return "LBHNC"


class TokenMajorConnector(EmptiedConnector):
    """As one that asks for the default."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: object) -> str | None:
        return "LBNHC"
