"""Prometheus metrics of the policy server (`GET /metrics`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Outcome = Literal["ok", "invalid", "oversized", "expired", "abandoned", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "invalid", "oversized", "expired", "abandoned", "failed")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """Metrics of one server. Each server has its own registry, so two servers in a process do not mix.

    Args:
        gpu_bytes: returns the GPU memory in use, in bytes; None without a GPU.
    """

    def __init__(self, gpu_bytes: Callable[[], float] | None = None) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("cogvla_requests", "Requests by outcome", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)  # start the series at 0, so that its first event shows as an increase
        self.latency = Histogram(
            "cogvla_request_seconds", "From the request's arrival to its answer", buckets=SECONDS, registry=registry
        )
        self.inference = Histogram("cogvla_inference_seconds", "One forward pass", buckets=SECONDS, registry=registry)
        self.batch = Histogram("cogvla_batch_size", "Requests per forward pass", buckets=BATCHES, registry=registry)
        self.queue = Gauge("cogvla_queue_length", "Requests that wait for a forward pass", registry=registry)
        self.clients = Gauge("cogvla_clients", "Connected clients", registry=registry)
        self.ready = Gauge("cogvla_ready", "1 after the warm-up, 0 before and while shutting down", registry=registry)
        if gpu_bytes is not None:
            memory = Gauge("cogvla_gpu_memory_bytes", "GPU memory that the policy has allocated", registry=registry)
            memory.set_function(gpu_bytes)

    def count(self, outcome: Outcome) -> None:
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
