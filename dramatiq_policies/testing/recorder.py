"""Record the outcomes, dead letters and log records of a drain in its `Run`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..outcomes import BAD_ENDINGS, OutcomeEvent
from .run import Entry, Run

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from .stub_environment import StubEnvironment

__all__ = ["recording"]

_LOGGERS = ("dramatiq_policies.outcomes", "dramatiq_policies.alerts")
_BAD = frozenset(outcome.value for outcome in BAD_ENDINGS)


@contextmanager
def recording(run: Run, environment: StubEnvironment, is_of_the_drain: Callable[[], bool]) -> Iterator[set[str]]:
    """Record events from now on, and yield the ids of messages that wait for the idempotency store.

    Parameters:
      is_of_the_drain: Returns whether the current log call comes from the drain.
    """
    clock, state, dead_letters = environment.clock, environment.state, environment.broker.dead_letters_by_queue
    began, entries = clock.now, run.entries
    before = {name: len(queue) for name, queue in dead_letters.items()}
    stalled: set[str] = set()

    def observe(event: OutcomeEvent, message: MessageProxy | None) -> None:
        entries.append(Entry(clock.now - began, event, message))
        if event.reason == "store_down":
            stalled.add(str(event.message_id))
        else:
            stalled.discard(str(event.message_id))

    handler = _BadEndings(run.logs, is_of_the_drain)
    state.outcomes.observe(run, observe)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield stalled
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        run.dead += [
            dead_letter for name, queue in dead_letters.items() for dead_letter in queue[before.get(name, 0) :]
        ]
        state.outcomes.forget(run)


class _BadEndings(logging.Handler):
    """Keeps the log records of failures."""

    def __init__(self, records: list[logging.LogRecord], is_of_the_drain: Callable[[], bool]) -> None:
        super().__init__()
        self.records = records
        self.is_of_the_drain = is_of_the_drain

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "outcome", None) in _BAD and self.is_of_the_drain():
            self.records.append(record)
