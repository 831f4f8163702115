# SPDX-License-Identifier: Apache-2.0
"""What vLLM's API server gets of this package's: the middleware, and what lives as long as it."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine.refusals import NotServingError
from vllm_sleep_ascend.front_end.middleware import SleepModeMiddleware, answer_not_serving

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Lifespan
    from vllm.v1.engine.async_llm import AsyncLLM


def with_middleware(stock: Callable[["FastAPI"], None]) -> Callable[["FastAPI"], None]:
    def register_instrumentator_api_routers(app: "FastAPI") -> None:
        stock(app)
        app.add_middleware(SleepModeMiddleware)
        app.add_exception_handler(NotServingError, answer_not_serving)
        app.router.lifespan_context = _with_ours(app.router.lifespan_context)

    return register_instrumentator_api_routers


def _with_ours(stock: "Lifespan[Any]") -> "Lifespan[Any]":
    @asynccontextmanager
    async def lifespan(app: "FastAPI") -> AsyncIterator[Any]:
        async with stock(app) as state, AsyncExitStack() as ours:
            client: AsyncLLM | None = app.state.engine_client
            if client is not None:
                config = SleepModeConfig.from_vllm_config(client.vllm_config)
                if config.has_door and _is_first(client):
                    from vllm_sleep_ascend.front_end.door import opened

                    await ours.enter_async_context(opened(app, config))
            yield state

    return lifespan


def _is_first(client: "AsyncLLM") -> bool:
    """Of the API servers that share the engines: one alone has the door."""
    rank: int = client.vllm_config.parallel_config._api_process_rank
    return rank <= 0
