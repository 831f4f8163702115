# SPDX-License-Identifier: Apache-2.0
"""What the proxy counts, in a registry of its own."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from vllm_sleep_ascend.proxy.turns import Server

NAMESPACE = "sleep_proxy"


class Metrics:
    """Prometheus metrics of one proxy; all names start with ``sleep_proxy_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "requests",
            "Requests by their end",
            ["server", "status"],
            registry=self.registry,
            namespace=NAMESPACE,
        )
        self.queued = Gauge(
            "queued", "Requests that wait", ["server"], registry=self.registry, namespace=NAMESPACE
        )
        self.in_flight = Gauge(
            "in_flight",
            "Requests that the server works on",
            ["server"],
            registry=self.registry,
            namespace=NAMESPACE,
        )
        self.wait = Histogram(
            "wait_seconds",
            "From the arrival of a request until its server is awake",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
            namespace=NAMESPACE,
        )
        self.awake = Gauge(
            "awake",
            "1 while the server is awake",
            ["server"],
            registry=self.registry,
            namespace=NAMESPACE,
        )
        self.switches = Counter(
            "switches", "Servers woken", ["server"], registry=self.registry, namespace=NAMESPACE
        )
        self.sleeps = Counter(
            "sleeps",
            "Servers put to sleep",
            ["server"],
            registry=self.registry,
            namespace=NAMESPACE,
        )
        self.failures = Counter(
            "failures",
            "Sleeps and wakes that failed",
            ["server", "operation"],
            registry=self.registry,
            namespace=NAMESPACE,
        )
        self.operation = Histogram(
            "operation_seconds",
            "Duration of sleeps and wakes",
            ["operation"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
            namespace=NAMESPACE,
        )

    def watch(self, server: "Server") -> None:
        """Have the gauges of this server read its state."""
        self.queued.labels(server.name).set_function(lambda: len(server.waiting))
        self.in_flight.labels(server.name).set_function(lambda: server.in_flight)
        self.awake.labels(server.name).set_function(lambda: float(server.state == "awake"))
