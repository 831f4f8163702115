# SPDX-License-Identifier: Apache-2.0
"""The sleep endpoints of vLLM's development mode, as the guides of vLLM and vllm-ascend write them.

With ``VLLM_SERVER_DEV_MODE=1`` they replace stock vLLM's: the level may also be in a JSON body,
``/is_sleeping`` also answers POST, ``/sleep_status`` says what each rank holds, and every refusal
is a 4xx or 5xx with a reason.
"""

import os
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from vllm_sleep_ascend import policy
from vllm_sleep_ascend.config import SleepModeConfig, check_enabled
from vllm_sleep_ascend.errors import ImageRefusedError
from vllm_sleep_ascend.front_end import metrics
from vllm_sleep_ascend.front_end.calls import typed
from vllm_sleep_ascend.front_end.replicas import rank_status
from vllm_sleep_ascend.status import state_of

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.dev.sleep.metrics import Operation
    from vllm.v1.engine.async_llm import AsyncLLM

Call = Callable[[], Awaitable[dict[str, object]]]

_FLAGS: dict[bool | str, bool] = {True: True, False: False, "true": True, "false": False}


def attach_router(app: "FastAPI") -> None:
    """Add the endpoints to ``app``, whose ``state.engine_client`` is vLLM's."""
    from fastapi import APIRouter, Request
    from fastapi.responses import JSONResponse
    from vllm.v1.engine.async_llm import AsyncLLM

    # Handlers are annotated in this scope, because FastAPI needs the class itself.
    router = APIRouter()

    @router.post("/sleep")
    async def sleep(request: Request) -> JSONResponse:
        return await _answer("sleep", _sleep, request)

    @router.post("/wake_up")
    async def wake_up(request: Request) -> JSONResponse:
        return await _answer("wake", _wake_up, request)

    if hasattr(AsyncLLM, "release_kv_cache_memory"):  # not in vLLM 0.23

        @router.post("/release_kv_cache_memory")
        async def release_kv_cache_memory(request: Request) -> JSONResponse:
            return await _answer("release_kv_cache_memory", _release_kv_cache_memory, request)

    @router.post("/save_image")
    async def save_image(request: Request) -> JSONResponse:
        return await _answer(None, _save_image, request)

    @router.api_route("/is_sleeping", methods=["GET", "POST"])
    async def is_sleeping(request: Request) -> JSONResponse:
        return JSONResponse({"is_sleeping": await client_of(request).is_sleeping()})

    @router.get("/sleep_status")
    async def sleep_status(request: Request) -> JSONResponse:
        return await _status(request)

    app.include_router(router)


def client_of(request: "Request") -> "AsyncLLM":
    client: AsyncLLM = request.app.state.engine_client
    return client


async def _status(request: "Request") -> "JSONResponse":
    """The engine's ``state`` (``status.State``), ``is_sleeping``, ``ranks`` and ``models``. A
    ``dead`` engine has no ranks, and answers with status 503."""
    from fastapi.responses import JSONResponse
    from vllm.v1.engine.exceptions import EngineDeadError

    client = client_of(request)
    try:
        if client.errored:
            raise client.dead_error
        is_sleeping = await client.is_sleeping()
        ranks = await metrics.record_async(client) or await rank_status(client)
    except EngineDeadError as error:
        return JSONResponse(
            {
                "state": "dead",
                "error": error_body(error, 503)["error"],
                "remedy": "restart the server; its log has the cause",
            },
            503,
        )
    state = state_of(ranks, is_sleeping)
    models = (await request.app.state.openai_serving_models.show_available_models()).data
    names = [model.id for model in models]
    return JSONResponse(
        {"state": state, "is_sleeping": is_sleeping, "models": names, "ranks": ranks}
    )


async def _answer(
    operation: "Operation | None",
    parse: Callable[["Request"], Awaitable[Call]],
    request: "Request",
) -> "JSONResponse":
    """Bad input is refused before it counts as an operation in vLLM's metrics; a failure counts.
    ``None`` is an operation that vLLM does not count."""
    from fastapi.responses import JSONResponse
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        call = await parse(request)
        with nullcontext() if operation is None else metrics.recorded(operation):
            return JSONResponse(await call())
    except (ValueError, RuntimeError, EngineDeadError) as error:
        status = 503
        if isinstance(error, ValueError):
            status = 400
        elif isinstance(error, ImageRefusedError):
            status = 409
        return JSONResponse(error_body(error, status), status)


def error_body(error: Exception, status: int) -> dict[str, dict[str, object]]:
    """As vLLM's own."""
    return {"error": {"type": type(error).__name__, "message": str(error), "code": status}}


async def _sleep(request: "Request") -> Call:
    options = await _options(request, ("level", "mode", "to"))
    level = _parse_level(options.get("level", 1))
    mode = policy.check_mode(options.get("mode", "abort"))
    place = policy.check_place(options.get("to"), level)
    client = client_of(request)
    SleepModeConfig.from_vllm_config(client.vllm_config).check_place(place)

    async def call() -> dict[str, object]:
        if place is None:
            await client.sleep(level, mode)
            return {"status": "sleeping", "level": level}
        await client.sleep(level, mode, to=place)  # type: ignore[call-arg]
        return {"status": "sleeping", "level": level, "to": place}

    return call


async def _wake_up(request: "Request") -> Call:
    tags = (await _options(request, ("tags",))).get("tags")
    wanted = policy.check_tags(tags)

    async def call() -> dict[str, object]:
        client = client_of(request)
        fully_awake = await client.wake_up(wanted)
        if fully_awake is None:  # vLLM 0.23
            fully_awake = not await client.is_sleeping()
        return {"status": "awake" if fully_awake else "sleeping", "tags": tags}

    return call


async def _release_kv_cache_memory(request: "Request") -> Call:
    await _options(request, ())

    async def call() -> dict[str, object]:
        await client_of(request).release_kv_cache_memory()
        return {"status": "kv_cache_released"}

    return call


async def _save_image(request: "Request") -> Call:
    """The body is ``{"dir": "/an/absolute/path", "replace": false}``."""
    options = await _options(request, ("dir", "replace"))
    directory, replace = options.get("dir"), options.get("replace", False)
    if not isinstance(directory, str) or not os.path.isabs(directory):
        raise ValueError(f"dir={directory!r}: an absolute path is needed, such as /images/NAME")
    if not isinstance(replace, bool | str) or replace not in _FLAGS:
        raise ValueError(f"replace={replace!r}: use true or false")
    client = client_of(request)
    check_enabled(client.vllm_config)

    async def call() -> dict[str, object]:
        with typed():
            await client.collective_rpc("save_image", args=(directory, _FLAGS[replace]))
        return {"status": "saved", "dir": directory}

    return call


async def _options(request: "Request", names: tuple[str, ...]) -> dict[str, object]:
    """The options of a call from its JSON body and its query.

    Raises:
        ValueError: the body is not a JSON object, an option is unknown, or one has two values.
    """
    options: dict[str, object] = {}
    if await request.body():
        try:
            options = await request.json()
        except ValueError:
            raise ValueError('the body is not JSON; send such as {"level": 1}, or none') from None
        if not isinstance(options, dict):
            raise ValueError(
                f'the body must be a JSON object such as {{"level": 1}}, not {options!r}'
            )
    for name in (*options, *request.query_params):
        if name not in names:
            known = f"use {', '.join(names)}" if names else "this call has none"
            raise ValueError(f"{name!r} is not an option here; {known}")
    for name in names:
        values = request.query_params.getlist(name)
        if not values:
            continue
        if name != "tags" and len(set(values)) > 1:
            raise ValueError(f"{name} is {' and '.join(map(repr, values))} in the query; send one")
        value = values if name == "tags" else values[0]
        if name in options and not _same(options[name], value):
            raise ValueError(
                f"{name} is {value!r} in the query and {options[name]!r} in the body; send one"
            )
        options[name] = value
    return options


def _same(given: object, in_query: object) -> bool:
    if isinstance(given, list) and isinstance(in_query, list):
        return set(map(str, given)) == set(in_query)
    return str(given) == in_query


def _parse_level(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    return policy.check_level(value)
