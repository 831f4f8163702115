# SPDX-License-Identifier: Apache-2.0
"""The proxy's metrics, in a separate registry."""

from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from vllm_sleep_ascend.proxy.servers import Server

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Prometheus metrics of one proxy; all names start with ``sleep_proxy_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here, prefix = self.registry, "sleep_proxy"
        counter = partial(Counter, namespace=prefix, registry=here)
        gauge = partial(Gauge, namespace=prefix, registry=here)
        histogram = partial(Histogram, namespace=prefix, registry=here, buckets=_SECONDS)
        by_server = ["server"]
        self.requests = counter(
            "requests", "Requests by their end; no server: refused", ["server", "status"]
        )
        self.queued = gauge("queued", "Requests that wait", by_server)
        self.in_flight = gauge("in_flight", "Requests that the server works on", by_server)
        self.wait = histogram(
            "wait_seconds", "From the arrival of a request until its server is awake"
        )
        self.awake = gauge("awake", "1 while the server is awake", by_server)
        self.switches = counter("switches", "Servers woken", by_server)
        self.sleeps = counter("sleeps", "Servers put to sleep", by_server)
        self.failures = counter("failures", "Sleeps and wakes that failed", ["server", "operation"])
        self.operation = histogram(
            "operation_seconds", "Duration of sleeps and wakes", ["operation"]
        )

    def watch(self, server: "Server") -> None:
        """Make this server's gauges read its state."""
        self.queued.labels(server.name).set_function(lambda: len(server.waiting))
        self.in_flight.labels(server.name).set_function(lambda: server.in_flight)
        self.awake.labels(server.name).set_function(lambda: float(server.state == "awake"))
