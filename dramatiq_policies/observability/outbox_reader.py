"""Read the outbox, for gauges and thresholds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..brokers.readers import QueueReading
from ..common.durations import format_duration
from ..common.safe_logger import SafeLogger
from ..delivery.broker_state import state_of
from ..outcomes import text_of
from .queue_thresholds import OUTBOX

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["OutboxReader"]

logger = SafeLogger("dramatiq_policies.alerts")


class OutboxReader:
    """Counts the messages of a broker's outbox. Logs an outage of the database once, and its end."""

    def __init__(self) -> None:
        self._failed = False

    def read(self, broker: Broker, interval: float) -> QueueReading | None:
        """Return the reading; None without an outbox, or if the database can't be read.

        Parameters:
          interval: The time to the next reading in milliseconds, for the log.
        """
        read = state_of(broker).read_outbox
        if read is None:
            return None
        try:
            found = read()
        except Exception as error:
            if not self._failed:
                self._failed = True
                logger.error(  # noqa: TRY400  The stack is of no use: the database is down.
                    "The outbox can't be read (%s: %s); trying again every %s.",
                    type(error).__name__,
                    text_of(error),
                    format_duration(interval),
                )
            return None
        if self._failed:
            self._failed = False
            logger.info("The outbox can be read again.")
        return QueueReading(queue=OUTBOX, ready=found.pending, oldest_ms=found.oldest_ms)
