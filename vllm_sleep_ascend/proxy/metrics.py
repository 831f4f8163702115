# SPDX-License-Identifier: Apache-2.0
"""What the proxy counts, in a registry of its own."""

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from vllm_sleep_ascend.proxy.servers import Server

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Prometheus metrics of one proxy; all names start with ``sleep_proxy_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here: dict[str, Any] = {"registry": self.registry, "namespace": "sleep_proxy"}
        by_server = ["server"]
        self.requests = Counter(
            "requests", "Requests by their end; no server: refused", ["server", "status"], **here
        )
        self.queued = Gauge("queued", "Requests that wait", by_server, **here)
        self.in_flight = Gauge("in_flight", "Requests that the server works on", by_server, **here)
        self.wait = Histogram(
            "wait_seconds",
            "From the arrival of a request until its server is awake",
            buckets=_SECONDS,
            **here,
        )
        self.awake = Gauge("awake", "1 while the server is awake", by_server, **here)
        self.switches = Counter("switches", "Servers woken", by_server, **here)
        self.sleeps = Counter("sleeps", "Servers put to sleep", by_server, **here)
        self.failures = Counter(
            "failures", "Sleeps and wakes that failed", ["server", "operation"], **here
        )
        self.operation = Histogram(
            "operation_seconds",
            "Duration of sleeps and wakes",
            ["operation"],
            buckets=_SECONDS,
            **here,
        )

    def watch(self, server: "Server") -> None:
        """Have the gauges of this server read its state."""
        self.queued.labels(server.name).set_function(lambda: len(server.waiting))
        self.in_flight.labels(server.name).set_function(lambda: server.in_flight)
        self.awake.labels(server.name).set_function(lambda: float(server.state == "awake"))
