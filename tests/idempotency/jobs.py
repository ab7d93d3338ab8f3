"""Jobs with a key, and their errors."""

from __future__ import annotations

from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from dramatiq_policies import (
    current_job,
)

from ..support import Stage


class Transient(Exception):
    pass


class Permanent(Exception):
    pass


def keep(stage, **options):
    """An actor with a key that writes down each run."""
    runs = []

    @stage.actor(idempotency_key="order:{order_id}", **options)
    def ship(order_id, note=None):
        runs.append((order_id, current_job().attempt))

    ship.runs = runs
    return ship


def with_results():
    backend = StubBackend()
    return Stage(middleware=[Results(backend=backend)]), backend
