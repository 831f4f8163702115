# SPDX-License-Identifier: Apache-2.0
"""The table of routes against those that vLLM registers."""

import typing

import pytest

from vllm_sleep_ascend import routes
from vllm_sleep_ascend.routes import Needs

# What vLLM registers with a package or an argument that the tests do not use, or from 0.33 on.
OPTIONAL = {
    "POST /v1/decisions",
    # Ours, where the plugin has been loaded
    *("GET /sleep_status", "POST /is_sleeping", "POST /save_image"),
    *("POST /cohere/v2/chat", "POST /cohere/v2/chat/render"),
    *("POST /start_profile", "POST /stop_profile"),
    *("POST /fault_tolerance/apply", "GET /fault_tolerance/status"),
}


@pytest.fixture(scope="module")
def registered(tiny_model):
    """The routes of a server whose model serves every task, in the development mode."""
    from vllm import tasks
    from vllm.config import ModelConfig, PoolerConfig
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args(["--enable-tokenizer-info-endpoint"])
        model = ModelConfig(
            str(tiny_model), runner="pooling", pooler_config=PoolerConfig(task="embed")
        )
        app = build_app(args, typing.get_args(tasks.SupportedTask), model)
    routes = [route for route in app.routes if hasattr(route, "endpoint")]
    return {
        f"{method} {route.path}"
        for route in routes
        if not route.path.startswith(("/docs", "/redoc", "/openapi.json"))
        for method in set(getattr(route, "methods", ["WEBSOCKET"])) - {"HEAD"}
    }


def test_every_route_of_vllm_is_in_the_table(registered):
    assert registered - set(routes.ROUTES) == set()


def test_the_table_names_no_route_that_vllm_lacks(registered):
    assert set(routes.ROUTES) - registered <= OPTIONAL


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/chat/completions", Needs.STEPS),
        ("POST", "/v1/chat/completions/render", Needs.TEXT),
        ("POST", "/v1/responses", Needs.STEPS),
        ("GET", "/v1/responses/resp_1", Needs.STORE),
        ("POST", "/v1/responses/resp_1/cancel", Needs.STORE),
        ("POST", "/v1/responses/render", Needs.TEXT),
        ("GET", "/v1/models", Needs.SERVER),
        ("POST", "/v1/load_lora_adapter", Needs.SERVER),
        ("HEAD", "/v1/responses/resp_1", Needs.STORE),
        ("POST", "/v1/of/a/later/vllm", Needs.STEPS),
        ("POST", "/v1/of/a/later/vllm/render", Needs.TEXT),
        ("GET", "/v1/of/a/later/vllm", Needs.SERVER),
        ("POST", "/of/a/plugin", Needs.SERVER),
    ],
)
def test_what_a_request_needs(method, path, expected):
    assert routes.needs(method, path) is expected
