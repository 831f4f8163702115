# SPDX-License-Identifier: Apache-2.0
"""KV connectors that keep blocks in a folder, derived from vLLM's example."""

import shutil
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class EmptiedConnector(ExampleConnector):
    """vLLM's example with a store that can be emptied."""

    def reset_cache(self) -> bool:
        for folder in Path(self._storage_path).iterdir():
            shutil.rmtree(folder)
        return True


class RegisteringConnector(EmptiedConnector):
    """Registers addresses, like a connector that transfers blocks by address."""

    def register_kv_caches(self, kv_caches: dict) -> None:
        self._addresses = [cache.data_ptr() for cache in kv_caches.values()]


class HeadMajorConnector(EmptiedConnector):
    """Requests another layout, as NIXL's does for speed."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: object) -> str | None:
        return "LBHNC"


class TokenMajorConnector(EmptiedConnector):
    """Requests the default layout."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: object) -> str | None:
        return "LBNHC"
