# SPDX-License-Identifier: Apache-2.0
"""A server with vLLM's own /v1/realtime and no model: it tells how many samples of audio came.

It writes its sleeps and wakes into a journal.
"""

import argparse
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.speech_to_text.realtime.api_router import router
from vllm.entrypoints.speech_to_text.realtime.serving import OpenAIServingRealtime


class Serving(OpenAIServingRealtime):
    def __init__(self, name: str) -> None:
        self._name = name
        self.model_cls = SimpleNamespace(realtime_max_tokens=1)
        self.engine_client: Any = self

    def _is_model_supported(self, model_name: str | None) -> bool:
        return model_name == self._name

    async def transcribe_realtime(self, audio_stream: Any, _: Any) -> AsyncIterator[Any]:
        async for audio in audio_stream:
            yield audio

    async def generate(self, prompt: Any, **_: Any) -> AsyncIterator[Any]:
        async for audio in prompt:
            said = SimpleNamespace(text=f"{len(audio)} ", token_ids=[1])
            yield SimpleNamespace(outputs=[said], prompt_token_ids=[1])

    async def abort(self, _: str) -> None:
        pass


class Denies:
    """Refuses sessions with a wrong key, as vLLM does with --api-key."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket" and (b"authorization", b"Bearer wrong") in scope["headers"]:
            error = {"error": {"message": "Unauthorized"}}
            await JSONResponse(error, 401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--journal", required=True)
    args = parser.parse_args()
    app = FastAPI()
    app.include_router(router)
    app.add_middleware(Denies)
    app.state.openai_serving_realtime = Serving(args.model)
    sleeps = False

    def note(event: str) -> dict[str, str]:
        with open(args.journal, "a") as journal:
            journal.write(f"{args.model} {event}\n")
        return {}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": args.model}]}

    @app.get("/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        return {"is_sleeping": sleeps}

    @app.post("/sleep")
    async def sleep() -> dict[str, str]:
        nonlocal sleeps
        sleeps = True
        return note("sleeps")

    @app.post("/wake_up")
    async def wake() -> dict[str, str]:
        nonlocal sleeps
        sleeps = False
        return note("wakes")

    @app.post("/v1/completions")
    async def complete(_: Request) -> JSONResponse:
        return JSONResponse({"model": args.model}, 500 if sleeps else 200)

    uvicorn.run(app, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
