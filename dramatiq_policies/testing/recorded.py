"""What Metrics would have sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..middleware.metrics import Metrics
from ..statsd import Statsd, Value
from ..wiring import Wiring

__all__ = ["recorded_metrics"]


@contextmanager
def recorded_metrics(wiring: Wiring, values: dict[str, Any]) -> Iterator[None]:
    """Keep the values of the broker's Metrics instead of sending them, or those of one that is there only meanwhile."""
    metrics, subscribers = wiring.metrics, list(wiring.stuck_subscribers)
    if metrics is not None:
        sent, metrics.statsd = metrics.statsd, _Recorder(values, tagged=metrics.statsd.tagged)
        try:
            yield
        finally:
            metrics.statsd = sent
        return
    metrics = Metrics(_Client())
    metrics.statsd = _Recorder(values, tagged=False)
    metrics.attach(wiring)
    try:
        yield
    finally:
        wiring.forget(metrics)
        wiring.metrics, wiring.stuck_subscribers[:] = None, subscribers


class _Client:
    """Makes a Metrics without the statsd package."""

    def incr(self, *args: Any) -> None: ...

    timing = gauge = incr


class _Recorder(Statsd):
    def __init__(self, values: dict[str, Any], *, tagged: bool) -> None:
        super().__init__(_Client())
        self.values = values
        self.tagged = tagged

    def send(self, values: Sequence[Value]) -> None:
        for kind, name, value, _ in values:
            if kind == "c":
                self.values[name] = self.values.get(name, 0) + value
            elif kind == "g":
                self.values[name] = value
            else:
                self.values.setdefault(name, []).append(value)

    def flush(self, timeout: float = 1.0) -> None: ...
