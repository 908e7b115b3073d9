"""What Prometheus is told, of one application: nothing of any question."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from d3tom_export.api.answers import Answer, Description
from d3tom_export.version import __version__

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of an application, in a registry of its own.

    Args:
        waiting: How many requests wait for a model.
        running: How many are being answered.
        ready: How many models are open.
    """

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int], ready: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        for name, says, function in (
            ("d3tom_waiting_requests", "Requests that wait for a model.", waiting),
            ("d3tom_running_requests", "Requests that are being answered.", running),
            ("d3tom_open_models", "Models that are open.", ready),
        ):
            Gauge(name, says, registry=registry).set_function(function)
        self.requests = Counter(
            "d3tom_requests",
            "Chat requests by the status that they ended with; 499: the client left.",
            ["code"],
            registry=registry,
        )
        self.seconds = Histogram(
            "d3tom_request_seconds", "From a request to the end of its answer.", buckets=_SECONDS, registry=registry
        )
        self.waited = Histogram(
            "d3tom_wait_seconds", "From a request's reading to its model.", buckets=_SECONDS, registry=registry
        )
        counters = {
            "steps": "Denoising steps of whole answers.",
            "prompt_tokens": "Tokens of their prompts.",
            "visual_tokens": "Of these, visual ones.",
            "completion_tokens": "Tokens of their answers.",
        }
        self._counters = {name: Counter(f"d3tom_{name}", says, registry=registry) for name, says in counters.items()}
        self._info = Gauge(
            "d3tom_info", "What answers.", ["version", "model", "backend", "precision", "kv_cache"], registry=registry
        )

    def opened(self, model: Description) -> None:
        """Say what answers."""
        cache = str(model.kv_cache).lower()
        self._info.labels(__version__, model.model, model.backend, model.precision, cache).set(1)

    def answered(self, answer: Answer) -> None:
        """Count a whole answer."""
        for name, more in (
            ("steps", answer.steps),
            ("prompt_tokens", answer.prompt_tokens),
            ("visual_tokens", answer.visual_tokens),
            ("completion_tokens", len(answer.token_ids)),
        ):
            self._counters[name].inc(more)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self._registry)
