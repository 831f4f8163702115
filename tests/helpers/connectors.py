# SPDX-License-Identifier: Apache-2.0
"""KV connectors that keep blocks in a folder, derived from vLLM's example."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
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


@dataclass
class Registration(KVConnectorHandshakeMetadata):
    """What peers need to know."""

    number: int


class UnregisteringConnector(RegisteringConnector):
    """As one of vLLM 0.33's, which takes the addresses back; ``told`` is what it was told.

    Its instance in the scheduler gets the registrations for peers, ``published``."""

    published: ClassVar[list[dict[int, Registration]]] = []

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.told: list[str] = []
        self.trouble = ""

    def register_kv_caches(self, kv_caches: dict) -> None:
        super().register_kv_caches(kv_caches)
        self._caches = list(kv_caches.values())
        self.told.append("register")
        self._registrations = 1

    def get_handshake_metadata(self) -> Registration:
        return Registration(self._registrations)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Registration]) -> None:
        self.published.append(metadata)

    def unregister_kv_caches(self) -> None:
        self.told.append("unregister")

    def restore_kv_caches(self) -> None:
        """Needs the memory. Fails once if ``trouble`` says so."""
        trouble, self.trouble = self.trouble, ""
        if trouble:
            raise OSError(trouble)
        self._addresses = [cache.data_ptr() for cache in self._caches]
        for cache in self._caches:
            cache[(0,) * cache.dim()].cpu()
        self.told.append("restore")
        self._registrations += 1


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
