"""What Metrics would have sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..middleware.metrics import Metrics, Nowhere
from ..outcomes import OutcomeEvent
from ..statsd import Statsd

__all__ = ["silenced", "values_of"]


class _Values(dict[str, Any]):
    """Metrics by name; 0 for what was not counted."""

    def __missing__(self, name: str) -> int:
        return 0


@contextmanager
def silenced(metrics: Metrics | None) -> Iterator[None]:
    """Have a broker's Metrics send nothing, while it lasts."""
    if metrics is None:
        yield
        return
    statsd, metrics.statsd = metrics.statsd, Statsd(Nowhere())
    try:
        yield
    finally:
        metrics.statsd = statsd


def values_of(events: Iterable[OutcomeEvent], metrics: Metrics | None) -> dict[str, Any]:
    """What a broker's Metrics, or one with its defaults, would have sent of these: sums of counters, lists of times."""
    if metrics is None:
        metrics = Metrics(Nowhere())
    found = _Values()
    for event in events:
        for kind, name, value, _ in metrics.values_of(event):
            if kind == "c":
                found[name] += value
            else:
                found.setdefault(name, []).append(value)
    return found
