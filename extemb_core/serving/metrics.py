"""Count what the server does, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from extemb_core.answers import Answer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Metrics of one server; none reveals anything about documents, questions or keys."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        on = self._registry
        self.requests = Counter("extemb_requests", "Requests, by route and status.", ("route", "status"), registry=on)
        self.at_work = Gauge("extemb_requests_at_work", "Requests at work or waiting.", registry=on)
        self.batch_size = Histogram(
            "extemb_batch_size", "Requests of a pass.", buckets=(1, 2, 4, 8, 16, 32), registry=on
        )
        self._first = Histogram("extemb_first_token_seconds", "Until the first token.", buckets=_SECONDS, registry=on)
        self._total = Histogram("extemb_answer_seconds", "Until the whole answer.", buckets=_SECONDS, registry=on)
        self._prompt = Counter("extemb_prompt_positions", "Positions of prompts.", registry=on)
        self._document = Counter("extemb_document_tokens", "Raw tokens of the documents of prompts.", registry=on)
        self._completion = Counter("extemb_completion_tokens", "Tokens of answers.", registry=on)

    def answered(self, answer: Answer) -> None:
        """Count an answer."""
        self._first.observe(answer.seconds["first_token"])
        self._total.observe(answer.seconds["total"])
        self._prompt.inc(answer.prompt_positions)
        self._document.inc(sum(entry.n_tokens for entry in answer.documents))
        self._completion.inc(answer.new_tokens)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
