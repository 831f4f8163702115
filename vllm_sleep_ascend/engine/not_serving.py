# SPDX-License-Identifier: Apache-2.0
"""The answer to a request that the engine cannot serve now."""

from http import HTTPStatus

from vllm_sleep_ascend.errors import SleepModeError

try:
    from vllm.exceptions import GracefulHTTPError
except ImportError:  # an older vLLM; its server is answered for by SleepModeMiddleware
    GracefulHTTPError = Exception  # type: ignore[assignment,misc]


class NotServingError(SleepModeError, GracefulHTTPError):
    """A generation request came while the engine sleeps, or before its weights were loaded.

    vLLM's server answers it with 503.
    """

    def __init__(self, message: str) -> None:
        RuntimeError.__init__(self, message)
        self.message = message
        self.http_status = HTTPStatus.SERVICE_UNAVAILABLE
