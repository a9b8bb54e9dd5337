"""What Prometheus is told of a service."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("cmaclip_requests_total", "Requests by route and status.", ["route", "status"], **made)
        self.seconds = Histogram(
            "cmaclip_request_seconds", "From the first byte to the answer.", ["route"], buckets=_SECONDS, **made
        )
        self.in_progress = Gauge("cmaclip_requests_in_progress", "Requests that are not answered yet.", **made)
        self.rows = Counter("cmaclip_rows_total", "Rows that were answered.", ["kind"], **made)
        self.batch = Histogram("cmaclip_batch_rows", "Rows of a batch.", buckets=_ROWS, **made)
        self.waiting = Gauge("cmaclip_queue_rows", "Rows that wait for the model.", **made)
        self.refused = Counter("cmaclip_refused_total", "Requests that were refused, by reason.", ["code"], **made)
        self.loads = Counter("cmaclip_model_loads_total", "Models that were loaded.", ["outcome"], **made)
        self.ready = Gauge("cmaclip_ready", "1 while a model is loaded and the service is not being stopped.", **made)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
