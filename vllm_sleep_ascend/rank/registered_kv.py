# SPDX-License-Identifier: Apache-2.0
"""What a KV connector registered of the KV cache's memory, which a sleep gives back.

Connectors of vLLM 0.33 can take it back and register it again; older ones that register memory are
refused with sleep mode (engine/kv_cache.py).
"""


def unregister() -> None:
    """Before the KV cache is unmapped. Repeating it changes nothing."""
    _tell("unregister_kv_caches")


def register_again() -> None:
    """Once the KV cache is mapped. Repeating it changes nothing."""
    _tell("restore_kv_caches")


def _tell(method: str) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if has_kv_transfer_group():
        call = getattr(get_kv_transfer_group(), method, None)
        if call is not None:
            call()
