# SPDX-License-Identifier: Apache-2.0
"""What each route of vLLM's server needs of its engine.

The server's middleware and the proxy go by it. A test compares it with the routes that vLLM
registers, so that a new one is noticed.
"""

import re
from enum import Enum


class Needs(Enum):
    """What an answer takes."""

    STEPS = "steps of the engine"
    TEXT = "a model's tokenizer or chat template, not its engine"
    STORE = "a response that one server keeps"
    SERVER = "the server itself; these are for whoever runs it"


_GROUPS = {
    Needs.STEPS: (
        *("POST /v1/chat/completions", "POST /v1/chat/completions/batch", "POST /v1/completions"),
        *("POST /v1/responses", "POST /v1/messages", "POST /cohere/v2/chat"),
        *("POST /v1/systemone", "POST /v1/decisions"),
        *("POST /inference/v1/generate", "POST /invocations", "POST /generative_scoring"),
        *("POST /v1/embeddings", "POST /v2/embed", "POST /pooling", "POST /classify"),
        *("POST /score", "POST /v1/score", "POST /rerank", "POST /v1/rerank", "POST /v2/rerank"),
        *("POST /v1/audio/transcriptions", "POST /v1/audio/translations"),
        "WEBSOCKET /v1/realtime",
    ),
    Needs.TEXT: (
        *("POST /tokenize", "POST /detokenize", "POST /v1/messages/count_tokens"),
        *("POST /v1/chat/completions/render", "POST /v1/completions/render"),
        *("POST /v1/messages/render", "POST /v1/responses/render", "POST /cohere/v2/chat/render"),
        *("POST /v1/chat/completions/derender", "POST /v1/completions/derender"),
    ),
    Needs.STORE: ("GET /v1/responses/{response_id}", "POST /v1/responses/{response_id}/cancel"),
    Needs.SERVER: (
        *("GET /health", "GET /ping", "POST /ping", "GET /load", "GET /version", "GET /metrics"),
        *("GET /v1/models", "GET /tokenizer_info", "GET /kv_event_sources"),
        *("POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"),
        *("POST /adapters", "DELETE /adapters/{adapter_name}"),
        *("POST /inference/v1/abort_requests", "POST /abort_requests"),
        *("POST /start_profile", "POST /stop_profile"),
        *("POST /scale_elastic_ep", "POST /is_scaling_elastic_ep"),
        *("POST /fault_tolerance/apply", "GET /fault_tolerance/status"),
        # The development mode
        *("POST /sleep", "POST /wake_up", "POST /release_kv_cache_memory", "GET /is_sleeping"),
        *("POST /is_sleeping", "GET /sleep_status", "POST /save_image"),
        *("POST /pause", "POST /resume", "GET /is_paused", "GET /server_info"),
        *("POST /collective_rpc", "POST /reset_prefix_cache", "POST /reset_mm_cache"),
        *("POST /reset_encoder_cache", "GET /get_world_size", "GET /weight_info"),
        *("POST /init_weight_transfer_engine", "POST /shutdown_weight_transfer_engine"),
        *("POST /start_weight_update", "POST /start_draft_weight_update"),
        *("POST /update_weights", "POST /finish_weight_update"),
        *("POST /update_weight_version", "POST /weight_checker"),
    ),
}
ROUTES = {route: needs for needs, routes in _GROUPS.items() for route in routes}
"""By method and path, as vLLM registers them."""

_TEXT_ENDS = ("/render", "/derender", "/count_tokens")
_STORED = re.compile("|".join(re.sub("{.*?}", "[^/]+", each) for each in _GROUPS[Needs.STORE]))


def needs(method: str, path: str) -> Needs:
    """What a request needs. A POST to an unknown path below ``/v1/`` needs steps, so that a route
    of a later vLLM finds its engine awake, unless its end says that it does not."""
    route = f"{'GET' if method == 'HEAD' else method} {path}"
    if _STORED.fullmatch(route):
        return Needs.STORE
    if route in ROUTES or not route.startswith("POST /v1/"):
        return ROUTES.get(route, Needs.SERVER)
    return Needs.TEXT if route.endswith(_TEXT_ENDS) else Needs.STEPS


def posts(what: Needs) -> list[str]:
    """The paths of the POST routes that need this."""
    return [each.removeprefix("POST ") for each in _GROUPS[what] if each.startswith("POST ")]
