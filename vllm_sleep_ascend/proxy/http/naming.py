# SPDX-License-Identifier: Apache-2.0
"""Which model a request names, and which server has it."""

import asyncio
import json

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from vllm_sleep_ascend.proxy.http.responses import Refused
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

_SHOWN = 200  # characters of a name that is refused
_PIECE = 1 << 16  # bytes of a form that are read at once


async def server_of(turns: Turns, model: str | None) -> Server:
    """
    Raises:
        Refused: no server has the model.
    """
    if model is None and len(turns.current) == 1:
        return turns.current[0]
    server = await turns.server_of(model) if model is not None else None
    if server is not None:
        return server
    known = ", ".join(sorted(models(turns)))
    if model is None:
        raise Refused(400, f"name a model, one of {known}")
    raise Refused(404, f"no model {model[:_SHOWN]!r}; there are {known}")


def models(turns: Turns) -> list[str]:
    """The names that a request can have."""
    names = (name for server in turns.current for name in (*server.names, *server.models))
    return list(dict.fromkeys(names))


async def model_of(request: Request, body: bytes) -> str | None:
    """The model that a request names, in JSON or, with a file, in a form.

    Raises:
        Refused: the body is neither, or the name is not a string.
    """
    if _has_form(request):
        model = await _in_form(request, body)
    else:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        model = content.get("model") if isinstance(content, dict) else None
    if model is not None and not isinstance(model, str):
        raise Refused(400, f"model must be a string, not {type(model).__name__}")
    return model


def _has_form(request: Request) -> bool:
    path, kind = request.scope["path"], request.headers.get("content-type", "")
    takes_one = path.startswith("/v1/audio/") or path == "/invocations"
    return takes_one and kind.lower().startswith("multipart/form-data")


async def _in_form(request: Request, body: bytes) -> object:
    pieces = (body[at : at + _PIECE] for at in range(0, len(body), _PIECE))

    async def receive() -> Message:
        await asyncio.sleep(0)  # others run while a large form is read
        piece = next(pieces, b"")
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    try:
        async with Request(request.scope, receive).form() as form:
            return form.get("model")
    except (HTTPException, ValueError) as error:
        raise Refused(400, f"the body is not a form: {getattr(error, 'detail', error)}") from None
