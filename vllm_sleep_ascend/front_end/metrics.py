# SPDX-License-Identifier: Apache-2.0
"""Prometheus gauges of what sleeps, from the ranks' status, in the front end's process."""

import asyncio
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Literal, get_args

from prometheus_client import REGISTRY, Gauge
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_sleep_ascend.front_end.replicas import rank_status
from vllm_sleep_ascend.status import RankStatus, level_of

if TYPE_CHECKING:
    from vllm.entrypoints.serve.dev.sleep.metrics import Operation
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

logger = init_logger(f"vllm.{__name__}")

_State = Literal["mapped", "offloaded", "discarded"]
_Location = Literal["device", "host", "disk"]
_STATES: tuple[_State, ...] = get_args(_State)
_LOCATIONS: tuple[_Location, ...] = get_args(_Location)
_SCRAPE_S = 1.0
_LABELS = ("model_name", "engine", "rank", "tag")


class SleepModeGauges:
    """Bytes of each rank by tag."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.state = _gauge(
            "vllm:sleep_mode_bytes",
            "Bytes of allocations that can sleep: mapped (awake), offloaded (asleep, content in "
            "host memory or on disk) or discarded (asleep, content forgotten).",
            (*_LABELS, "state"),
        )
        self.held = _gauge(
            "vllm:sleep_mode_held_bytes",
            "Bytes that sleep mode holds: device memory, and backups in pinned host memory and on "
            "disk.",
            (*_LABELS, "location"),
        )
        self.backups = _gauge(
            "vllm:sleep_mode_backup_bytes",
            "Bytes that are asleep with their content, by where the backup lies: host or disk.",
            (*_LABELS, "location"),
        )

    def set(self, ranks: Iterable[RankStatus]) -> None:
        """Set the figures from ``sleep_status``."""
        for rank in ranks:
            for tag, usage in rank.get("tags", {}).items():
                labels = (self._model_name, str(rank["engine"]), str(rank["rank"]), tag)
                for state in _STATES:
                    self.state.labels(*labels, state).set(usage[state])
                for location in _LOCATIONS:
                    self.held.labels(*labels, location).set(usage[location])
                self.backups.labels(*labels, "host").set(usage["asleep_in_host"])
                self.backups.labels(*labels, "disk").set(usage["asleep_on_disk"])


def _gauge(name: str, documentation: str, labels: tuple[str, ...]) -> Gauge:
    """The gauge of this process. Engines share it, but each new one removes it with vLLM's."""
    registered = REGISTRY._names_to_collectors.get(name)
    if isinstance(registered, Gauge):
        return registered
    return Gauge(name, documentation, labels, multiprocess_mode="mostrecent")


def record(engine: "LLMEngine") -> None:
    """Update the metrics of an LLMEngine, if it has any."""
    if has_metrics(engine) and not _is_dead(engine):
        with suppress(EngineDeadError):
            _publish(engine, engine.collective_rpc("sleep_status"), engine.is_sleeping())


async def record_async(engine: "AsyncLLM") -> list[RankStatus]:
    """Like ``record`` for an AsyncLLM; returns the ranks' status."""
    if _is_dead(engine):
        return []
    try:
        ranks = await rank_status(engine)
        if has_metrics(engine):
            _publish(engine, ranks, await engine.is_sleeping())
    except EngineDeadError:
        return []
    return ranks


def _is_dead(engine: "LLMEngine | AsyncLLM") -> bool:
    return bool(getattr(engine, "errored", False))


def has_metrics(engine: "LLMEngine | AsyncLLM") -> bool:
    """Whether the gauges of this LLMEngine or AsyncLLM are exported."""
    return engine.logger_manager is not None and engine.model_config.enable_sleep_mode


def _publish(engine: "LLMEngine | AsyncLLM", ranks: list[RankStatus], is_sleeping: bool) -> None:
    SleepModeGauges(str(engine.model_config.served_model_name)).set(ranks)
    assert engine.logger_manager is not None
    # vLLM's own gauge, which in stock vLLM follows what was requested.
    engine.logger_manager.record_sleep_state(int(is_sleeping), level_of(ranks))


class Refresher:
    """Refreshes the gauges before they are read."""

    def __init__(self) -> None:
        self._refresh: asyncio.Task[list[RankStatus]] | None = None

    async def refresh(self, engine: "AsyncLLM") -> None:
        """An engine that is busy with an operation answers too late: then the last figures stay."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(record_async(engine))
        await asyncio.wait([self._refresh], timeout=_SCRAPE_S)


def recorded(operation: "Operation") -> AbstractContextManager[None]:
    """vLLM's own metrics of an operation, if it has them."""
    try:
        from vllm.entrypoints.serve.dev.sleep.metrics import sleep_mode_operation_metrics
    except ImportError:
        return nullcontext()
    return sleep_mode_operation_metrics().record(operation)
