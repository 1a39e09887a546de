"""The server's Prometheus metrics."""

import contextlib
import functools
import threading
from collections.abc import Mapping, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)
_VERSION = ("model", "version")
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class ServerMetrics:
    """The metrics of a server, in a Prometheus registry that belongs to this server only."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        options = {"namespace": "cnn_jax", "registry": self.registry}
        gauge = functools.partial(Gauge, **options)
        counter = functools.partial(Counter, **options)
        timer = functools.partial(Histogram, buckets=_SECONDS, **options)

        self.requests = counter("requests", "Answered requests.", ("route", "method", "status"))
        self.latency = timer(
            "request_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ("route",),
        )
        self.arm_seconds = timer(
            "arm_request_seconds",
            "Seconds of the requests of experiments, as EXPERIMENT/ARM.",
            ("arm", "status"),
        )
        self.refused = counter("refused", "Requests that were answered with an error.", ("reason",))
        self.predictions = counter("predictions", "Classified images.", (*_VERSION, "class"))
        self.shadow_skipped = counter(
            "shadow_skipped",
            "Requests that a shadow experiment's challenger did not predict, for lack of capacity.",
            ("model",),
        )
        self.batch_images = Histogram(
            "batch_images", "Images per batch.", buckets=_IMAGES, **options
        )
        self.batch_seconds = timer("batch_seconds", "Seconds that a batch took.")
        self.images_in_flight = gauge(
            "images_in_flight", "Images in decoding, waiting or in computation."
        )
        self.body_bytes = gauge("body_bytes", "Bytes of request bodies in memory.")
        self.lost_rows = gauge(
            "request_log_lost_rows", "Rows of the request log that could not be written."
        )
        self.last_read = gauge(
            "registry_read_timestamp_seconds", "Unix time of the registry's last answer."
        )
        self.loads = counter(
            "loads", "Attempts to load a version, by outcome.", ("model", "outcome")
        )
        self.hanging_loads = gauge(
            "hanging_loads", "Threads that still load a version after --load_timeout."
        )
        self.loaded = gauge(
            "version_loaded", "1 while the version is loaded; absent otherwise.", _VERSION
        )
        self.loading = gauge(
            "version_loading_seconds",
            "Seconds for which the version has been loading; absent otherwise.",
            _VERSION,
        )

    def count_batch(self, images: int, seconds: float) -> None:
        """Adds the size and the run time of a batch to the metrics."""
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def remove_version(self, model: str, version: int, class_names: Sequence[str]) -> None:
        """Removes the prediction counters of an unloaded version."""
        for name in class_names:
            with contextlib.suppress(KeyError):
                self.predictions.remove(model, version, name)

    def expose(self, loading: Mapping[tuple[str, int], float]) -> bytes:
        """Returns all metrics in Prometheus's text format; may be called in any thread.

        Args:
          loading: The seconds for which versions have been loading, by (model, number).
        """
        with self._lock:  # Without the lock, a thread could read an empty metric.
            self.loading.clear()
            for key, value in loading.items():
                self.loading.labels(*key).set(value)
            return prometheus_client.generate_latest(self.registry)
