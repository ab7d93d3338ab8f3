"""Compute the values of Metrics without a client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..middleware.metrics import Metrics, Nowhere
from ..outcomes import OutcomeEvent

__all__ = ["values_of"]


class _Values(dict[str, Any]):
    """Metrics by name; 0 for a missing counter."""

    def __missing__(self, name: str) -> int:
        return 0


def values_of(events: Iterable[OutcomeEvent], metrics: Metrics | None) -> dict[str, Any]:
    """Return the values that a broker's Metrics, or a default Metrics, would send: sums of counters, lists of times."""
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
