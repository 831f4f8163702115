# SPDX-License-Identifier: Apache-2.0
"""The sleep endpoints of vLLM's development mode, as the guides of vLLM and vllm-ascend write them.

They take the place of stock vLLM's where ``VLLM_SERVER_DEV_MODE=1`` shows those: the level may
also come in a JSON body, ``/is_sleeping`` also answers POST, ``/sleep_status`` says what each rank
holds, and every refusal is a 4xx or 5xx with a reason.
"""

from typing import TYPE_CHECKING, Any

from vllm_sleep_ascend import policy

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse


def install() -> None:
    """Have vLLM attach these endpoints in place of its own. Repeating it changes nothing."""
    from vllm import envs

    if envs.VLLM_SERVER_DEV_MODE:
        from vllm.entrypoints.serve.dev.sleep import api_router

        api_router.attach_router = attach_router


def attach_router(app: "FastAPI") -> None:
    """Add the endpoints to ``app``, whose ``state.engine_client`` is vLLM's."""
    from fastapi import APIRouter, Request

    # Handlers are annotated in this scope: FastAPI has to see the class itself.
    router = APIRouter()

    @router.post("/sleep")
    async def sleep(request: Request) -> Any:
        return await _answer(_sleep, "sleep", request)

    @router.post("/wake_up")
    async def wake_up(request: Request) -> Any:
        return await _answer(_wake_up, "wake", request)

    @router.post("/release_kv_cache_memory")
    async def release_kv_cache_memory(request: Request) -> Any:
        return await _answer(_release_kv_cache_memory, "release_kv_cache_memory", request)

    @router.api_route("/is_sleeping", methods=["GET", "POST"])
    async def is_sleeping(request: Request) -> Any:
        return {"is_sleeping": await request.app.state.engine_client.is_sleeping()}

    @router.get("/sleep_status")
    async def sleep_status(request: Request) -> Any:
        client = request.app.state.engine_client
        return {
            "is_sleeping": await client.is_sleeping(),
            "ranks": await client.collective_rpc("sleep_status"),
        }

    app.include_router(router)


async def _answer(handler: Any, operation: Any, request: "Request") -> "JSONResponse":
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.dev.sleep.metrics import sleep_mode_operation_metrics

    from vllm_sleep_ascend.errors import SleepModeError

    try:
        with sleep_mode_operation_metrics().record(operation):
            return JSONResponse(await handler(request))
    except (ValueError, SleepModeError, RuntimeError) as error:
        status = 400 if isinstance(error, ValueError) else 503
        return JSONResponse(
            {"error": {"type": type(error).__name__, "message": str(error), "code": status}}, status
        )


async def _sleep(request: "Request") -> dict[str, Any]:
    options = await _options(request, ("level", "mode"))
    level = _parse_level(options.get("level", 1))
    mode = policy.check_mode(options.get("mode", "abort"))
    await request.app.state.engine_client.sleep(level, mode)
    return {"status": "sleeping", "level": level}


async def _wake_up(request: "Request") -> dict[str, Any]:
    tags: Any = request.query_params.getlist("tags")
    if not tags:
        tags = (await _options(request, ("tags",))).get("tags")
    fully_awake = await request.app.state.engine_client.wake_up(policy.check_tags(tags))
    return {"status": "awake" if fully_awake else "sleeping", "tags": tags}


async def _release_kv_cache_memory(request: "Request") -> dict[str, Any]:
    await request.app.state.engine_client.release_kv_cache_memory()
    return {"status": "kv_cache_released"}


async def _options(request: "Request", names: tuple[str, ...]) -> dict[str, Any]:
    """The options of a call from its JSON body and its query.

    Raises:
        ValueError: the body is not a JSON object, has another key, or contradicts the query.
    """
    options: dict[str, Any] = {}
    if await request.body():
        try:
            options = await request.json()
        except ValueError:
            raise ValueError('the body is not JSON; send such as {"level": 1}, or none') from None
        if not isinstance(options, dict):
            raise ValueError(
                f'the body must be a JSON object such as {{"level": 1}}, not {options!r}'
            )
        for name in options:
            if name not in names:
                raise ValueError(f"{name!r} is not an option here; use {', '.join(names)}")
    for name in names:
        value = request.query_params.get(name)
        if value is None:
            continue
        if name in options and str(options[name]) != value:
            raise ValueError(
                f"{name} is {value!r} in the query and {options[name]!r} in the body; send one"
            )
        options[name] = value
    return options


def _parse_level(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    return policy.check_level(value)
