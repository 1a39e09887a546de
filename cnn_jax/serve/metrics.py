"""What the server counts, for Prometheus."""

import contextlib
from collections.abc import Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Measures:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        options = {"namespace": "cnn_jax", "registry": self.registry}
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "requests", "Answered requests.", ("route", "method", "status"), **options
        )
        self.latency = Histogram(
            "request_seconds",
            "From a request's headers to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            **options,
        )
        self.refused = Counter("refused", "Requests that got an error.", ("reason",), **options)
        self.predictions = Counter(
            "predictions", "Answered images.", ("model", "version", "class"), **options
        )
        self.batch_images = Histogram(
            "batch_images", "Images that were computed together.", buckets=_IMAGES, **options
        )
        self.batch_seconds = Histogram(
            "batch_seconds", "What a batch has taken.", buckets=_SECONDS, **options
        )
        self.inside = Gauge("images_inside", "Images decoded, waiting or computed.", **options)
        self.body_bytes = Gauge("body_bytes", "Bodies that are held in memory.", **options)
        self.lost_rows = Gauge(
            "request_log_lost_rows", "Answers that could not be noted.", **options
        )
        self.last_look = Gauge(
            "last_look_timestamp_seconds", "When the registry has last answered.", **options
        )
        self.loads = Counter("loads", "Versions that were loaded.", ("model", "outcome"), **options)
        self.loaded = Gauge(
            "version_loaded", "1 for what can be asked.", ("model", "version"), **options
        )

    def count_batch(self, images: int, seconds: float) -> None:
        """A batch was computed."""
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def forget(self, model: str, version: int, class_names: Sequence[str]) -> None:
        """A version is gone: nothing more will be counted of it."""
        for name in class_names:
            with contextlib.suppress(KeyError):
                self.predictions.remove(model, version, name)

    def expose(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return prometheus_client.generate_latest(self.registry)
