# SPDX-License-Identifier: Apache-2.0
"""How a client tells that there is no server from what goes wrong on its own side."""

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_sleep_ascend.client.calls import Calls, NoServer, Unreachable


@contextmanager
def no_free_descriptor() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("host", ["127.0.0.1", "unix"])
def test_a_client_without_free_descriptors_does_not_take_a_server_for_gone(tmp_path, host):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://{host}:{unused.getsockname()[1]}"
        asyncio.run(ask(f"unix:{tmp_path / 'none'}" if host == "unix" else url))


async def ask(url: str) -> None:
    calls = Calls(url, 5, None)
    try:
        with pytest.raises(NoServer):
            await calls.call("GET", "/health")
        assert await calls.is_gone(5)
        with no_free_descriptor():
            with pytest.raises(Unreachable) as caught:
                await calls.call("GET", "/health")
            assert not await calls.is_gone(5)
        assert type(caught.value) is Unreachable
    finally:
        await calls.close()
