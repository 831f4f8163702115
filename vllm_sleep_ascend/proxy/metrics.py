# SPDX-License-Identifier: Apache-2.0
"""The proxy's metrics, in a separate registry."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.states import STATES, State

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
        self.starts = counter("starts", "Servers started", by_server)
        self.deaths = counter(
            "deaths", "Servers that the proxy has started and not ended", by_server
        )
        self.failures = counter(
            "failures", "Starts, sleeps and wakes that failed", ["server", "operation"]
        )
        self.operation = histogram(
            "operation_seconds", "Duration of starts, sleeps and wakes", ["operation"]
        )
        self.state = gauge("state", "1 for the server's state", ["server", "state"])

    def watch(self, server: Server) -> None:
        """Make this server's gauges read its state."""
        self.queued.labels(server.name).set_function(lambda: len(server.waiting))
        self.in_flight.labels(server.name).set_function(lambda: server.in_flight)
        self.awake.labels(server.name).set_function(lambda: float(server.state == "awake"))

        def is_in(state: State) -> float:
            return float(server.state == state)

        for state in STATES:
            self.state.labels(server.name, state).set_function(partial(is_in, state))

    def forget(self, name: str) -> None:
        """Show no more of the server with this name; its counters stay."""
        for gauge in (self.queued, self.in_flight, self.awake):
            gauge.remove(name)
        for state in STATES:
            self.state.remove(name, state)
