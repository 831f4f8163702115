# SPDX-License-Identifier: Apache-2.0
"""KV connectors, which keep copies of the KV cache elsewhere, and KV-cache events.

A sleep discards the KV cache, and level 2 the weights from which it was computed. So copies have to
be discarded too, and subscribers to the events have to be notified.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_sleep_ascend.engine.state import scheduler_of

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

_Reset = Callable[["EngineCore", bool, bool], bool]


def check_connector(vllm_config: "VllmConfig") -> None:
    """Let an engine with sleep mode have a KV connector only if a sleep leaves nothing of it stale.

    vLLM's interface has a call that empties a connector's store (``reset_cache``), and from 0.33 on
    one that unregisters the cache's memory (``unregister_kv_caches``).

    Raises:
        ValueError: names the connector, why it cannot be used, and what to do.
    """
    offload_gib = vllm_config.cache_config.kv_offloading_size
    transfer = vllm_config.kv_transfer_config
    if offload_gib is not None:
        backend = vllm_config.cache_config.kv_offloading_backend
        name, reason = f"--kv-offloading-backend {backend}", "it registers the KV cache's memory"
        remedy = "leave out --kv-offloading-size"
    elif transfer is not None and transfer.kv_connector is not None:
        name, reason = f"the KV connector {transfer.kv_connector}", _stale_after_sleep(transfer)
        remedy = "leave out --kv-transfer-config"
    else:
        return
    if reason:
        raise ValueError(
            f"sleep mode with {name} is not supported: {reason}; {remedy} or enable_sleep_mode"
        )


def _stale_after_sleep(transfer: "KVTransferConfig") -> str:
    """What of this connector would be stale after a sleep; "" if nothing would."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    def overrides(call: str) -> bool:
        return getattr(connector, call, None) is not getattr(KVConnectorBase_V1, call, None)

    try:
        connector = KVConnectorFactory.get_connector_class(transfer)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    for child in transfer.kv_connector_extra_config.get("connectors", ()):  # MultiConnector's
        if reason := _stale_after_sleep(KVTransferConfig(**child)):
            return f"{child['kv_connector']}: {reason}"
    takes_back = overrides("unregister_kv_caches") and overrides("restore_kv_caches")
    if overrides("register_kv_caches") and not takes_back:
        return (
            "it registers the KV cache's memory (register_kv_caches), which a sleep gives back, "
            "and lacks unregister_kv_caches or restore_kv_caches, which vLLM has from 0.33 on"
        )
    if not overrides("reset_cache"):
        return (
            "its store cannot be emptied (it has no reset_cache), so that it would serve keys and "
            "values of weights that are gone"
        )
    return ""


def with_copies(stock: _Reset) -> _Reset:
    """``EngineCore.reset_prefix_cache``, which every way to discard the cache goes through: empty
    the connector's store with it, and publish the events now rather than with the next step."""

    def reset_prefix_cache(
        self: "EngineCore", reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if self.vllm_config.model_config.enable_sleep_mode:
            reset_connector = self.scheduler.get_kv_connector() is not None
        done = stock(self, reset_running_requests, reset_connector)
        events = self.vllm_config.kv_events_config
        if events is not None and events.enable_kv_cache_events:
            _publish_events(scheduler_of(self))
        return done

    return reset_prefix_cache


def _publish_events(scheduler: "Scheduler") -> None:
    from vllm.distributed.kv_events import KVEventBatch

    events: list[Any] = list(scheduler.kv_cache_manager.take_events() or ())
    connector = scheduler.get_kv_connector()
    if connector is not None:
        events.extend(connector.take_events())
    if events:
        scheduler.kv_event_publisher.publish(KVEventBatch(ts=time.time(), events=events))
