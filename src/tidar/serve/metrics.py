"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Requests by path and status, but for /health and /metrics.", "path", "status"
        )
        self.ended = self._counter("answers", "Answers that ended: stop, length, cancelled or failed.", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens prefilled.")
        self.tokens = self._counter("generated_tokens", "Tokens generated.")
        self.forwards = self._counter("forwards", "Forward passes over the batch: prefill or step.", "kind")
        self.running = Gauge("tidar_running_rows", "Rows in the batch.", registry=self.registry)
        self.waiting = Gauge("tidar_waiting_rows", "Rows that wait for a place.", registry=self.registry)
        self.acceptance = Histogram(
            "tidar_acceptance_length",
            "Tokens that a step gave a row that is drafted for.",
            buckets=(1, 2, 3, 4, 5, 6, 7, 8, 12, 16),
            registry=self.registry,
        )
        self.prefill = Histogram(
            "tidar_prefill_seconds", "Time of a prefill, for which running rows wait.", registry=self.registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tidar_{name}", text, labels, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
