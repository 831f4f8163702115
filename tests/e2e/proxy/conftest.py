# SPDX-License-Identifier: Apache-2.0
"""Real servers that take turns on one simulated NPU.

The device has room for all of them, so only the proxy prevents that two are awake at once.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from helpers.models import make_model
from helpers.proxy import PROMPTS, TOKENS, Proxy, used
from helpers.server import SMALL, Server

OPTIONS = (
    "--enable-sleep-mode",
    "--enable-scale-out",
    "--enable-request-id-headers",
    "--dtype",
    "float32",
    *SMALL,
    "--gpu-memory-utilization",
    "0.4",
)
CHUNKS = ("--additional-config", '{"sleep_mode": {"chunk_mib": 2}}')
API_KEY = "key-of-the-third"

Start = Callable[..., Server]


@pytest.fixture(scope="package")
def start(tmp_path_factory) -> Iterator[Start]:
    """Start a model's server and put it to sleep.

    ``texts`` are its answers to the prompts; ``alone`` is the device memory used while only this
    server is awake.
    """
    logs = tmp_path_factory.mktemp("servers")
    faults = logs / "faults"
    faults.touch()
    env = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
        "NPU_SIM_MACHINE": f"proxy-{os.getpid()}",
        "NPU_SIM_HBM_GIB": "1",
        "NPU_SIM_LINK_GBPS": "0.05",
        "NPU_SIM_FAULTS_FILE": str(faults),
    }
    with contextlib.ExitStack() as stack:

        def start(model: str, name: str, *options: str, key: str = "", port: int = 0) -> Server:
            server = stack.enter_context(
                Server(
                    *(make_model(model), "--served-model-name", name, *OPTIONS, *CHUNKS, *options),
                    log=logs / name,
                    env=env,
                    port=port,
                )
            )
            if key:
                server.http.headers["Authorization"] = f"Bearer {key}"
            server.model = name
            server.texts = {prompt: server.complete(prompt, TOKENS) for prompt in PROMPTS}
            server.alone = used(server)
            server.faults = faults
            server.post("/sleep")
            return server

        yield start


@pytest.fixture(scope="package")
def pair(start) -> list[Server]:
    """Two servers of different models."""
    servers = [start("tiny-qwen2", "model-a"), start("tiny-llama", "model-b")]
    assert servers[0].texts != servers[1].texts
    return servers


@pytest.fixture(scope="package")
def third(start, pair) -> Server:
    """A third server, which requires an API key."""
    for server in pair:
        server.post("/sleep")
    return start("tiny-gemma2", "model-c", "--api-key", API_KEY, key=API_KEY)


@pytest.fixture(scope="module")
def proxy(pair) -> Iterator[Proxy]:
    with Proxy(pair) as proxy:
        yield proxy
