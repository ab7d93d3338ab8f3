"""Thresholds of queues, and alerts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any, Literal

from ..brokers.readers import QueueReading
from ..common.callables import is_sync_callable
from ..common.durations import format_duration
from ..common.plurals import counted
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_duration

__all__ = ["OUTBOX", "OnAlert", "QueueAlert", "Threshold", "ThresholdTracker", "notifiers"]

logger = SafeLogger("dramatiq_policies.alerts")

#: The name of the outbox among the queues. No queue has this name, and no pattern of a user stands for it.
OUTBOX = "\0outbox"
#: A breach ends when the value falls to this share of the threshold.
_DOWN = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The values at which a queue raises an alert. Give at least one.

    Example::

        QueueMonitor(thresholds={"mail": Threshold(ready=1_000, oldest=timedelta(minutes=5))})

    Attributes:
      ready: Ready messages. Default: no threshold.
      oldest: Age of the oldest ready message, in milliseconds or as a ``timedelta``. Default: no threshold.
      stalled: Time without a worker taking a ready message, in milliseconds or as a ``timedelta``. Counts from the first reading.
        Default: no threshold.
      dead: Dead letters. Default: no threshold.
      notify_clear: Also send an alert when the value has fallen to 80 % of the threshold. Default: False.

    Raises:
      ConfigurationError: A number below 1, an invalid duration, or no threshold.
    """

    ready: int | None = None
    oldest: int | timedelta | None = None
    stalled: int | timedelta | None = None
    dead: int | None = None
    notify_clear: bool = False

    def __post_init__(self) -> None:
        given = False
        for name in ("ready", "dead", "oldest", "stalled"):
            value = getattr(self, name)
            if value is None:
                continue
            given = True
            if name in ("ready", "dead"):
                if type(value) is not int or value < 1:
                    raise ConfigurationError.of_option("Threshold", name, "a number of messages, at least 1", value)
                continue
            object.__setattr__(self, name, checked_duration("Threshold", name, value, least=1))
        if not given:
            raise ConfigurationError("Threshold(): expected at least one of ready, oldest, stalled and dead.")

    def measures(self, reading: QueueReading) -> list[tuple[str, int, int]]:
        """Return (name, value, threshold) of each known measure with a threshold."""
        pairs = (
            ("ready", reading.ready, self.ready),
            ("oldest", reading.oldest_ms, self.oldest),
            ("stalled", reading.stalled_ms, self.stalled),
            ("dead", reading.dead, self.dead),
        )
        return [(name, value, int(limit)) for name, value, limit in pairs if value is not None and limit is not None]  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueAlert:
    """A queue has reached a threshold, or the breach has ended. ``QueueMonitor(on_alert=…)`` calls your function with it::

        def page(alert: QueueAlert) -> None:
            pages.send(str(alert))  # Queue mail: 1200 messages wait (threshold 1000)

    Attributes:
      queue: The name of the queue.
      measure: ``"ready"``, ``"oldest"``, ``"stalled"`` or ``"dead"``, as in `Threshold`.
      value: The reading; in milliseconds for ``oldest`` and ``stalled``.
      threshold: The threshold, in the same unit.
      cleared: Whether the breach has ended.
      is_outbox: Whether the alert is about the outbox; then ``queue`` is ``"outbox"``.
    """

    queue: str
    measure: str
    value: int
    threshold: int
    cleared: bool = False
    is_outbox: bool = False

    @classmethod
    def of(cls, queue: str, measure: str, value: int, threshold: int, *, cleared: bool = False) -> QueueAlert:
        """Make the alert of a queue, or of `OUTBOX`."""
        return cls(
            queue=queue.removeprefix("\0"),
            measure=measure,
            value=value,
            threshold=threshold,
            cleared=cleared,
            is_outbox=queue == OUTBOX,
        )

    def __str__(self) -> str:
        value, limit = (
            (format_duration(self.value), format_duration(self.threshold))
            if self.measure in ("oldest", "stalled")
            else (str(self.value), str(self.threshold))
        )
        what = {
            "ready": counted(self.value, "message waits", "messages wait"),
            "oldest": f"the oldest message has waited for {value}",
            "stalled": f"messages wait, and workers have received none for {value}",
            "dead": counted(self.value, "dead letter"),
        }[self.measure]
        where = "Outbox" if self.is_outbox else f"Queue {self.queue}"
        return f"{where}: {what} (threshold {limit}){('; the breach has ended' if self.cleared else '')}"


class ThresholdTracker:
    """Compares readings with thresholds. Reports each breach once, until the value has fallen again.

    Parameters:
      thresholds: Thresholds by queue name or pattern. An exact name wins over patterns, then the first matching pattern wins.
      outbox: The threshold of the outbox.

    Raises:
      ConfigurationError: ``thresholds`` is no mapping of names to thresholds, or ``outbox`` has other measures than ``ready`` and
        ``oldest``.
    """

    def __init__(self, thresholds: Mapping[str, Threshold] | None, outbox: Threshold | None = None) -> None:
        given: Any = {} if thresholds is None else thresholds
        if not isinstance(given, Mapping):
            raise ConfigurationError.of_option("QueueMonitor", "thresholds", "a mapping of queue names", given)
        for queue, threshold in given.items():
            if not isinstance(queue, str) or not isinstance(threshold, Threshold):
                raise ConfigurationError.of_option(
                    "QueueMonitor",
                    "thresholds",
                    "names or patterns of queues, each with a Threshold",
                    {queue: threshold},
                )
        checked: Any = outbox
        if outbox is not None and not (
            isinstance(checked, Threshold) and outbox.stalled is None and outbox.dead is None
        ):
            raise ConfigurationError.of_option(
                "QueueMonitor", "outbox", "a Threshold of ready, oldest, or both", outbox
            )
        self.outbox = outbox
        self._thresholds: dict[str, Threshold] = dict(given)
        #: Open breaches: (queue, measure).
        self.open: set[tuple[str, str]] = set()

    @property
    def thresholds(self) -> list[Threshold]:
        """All thresholds, in their order."""
        return [*self._thresholds.values(), *(() if self.outbox is None else (self.outbox,))]

    def reset(self) -> ThresholdTracker:
        """Return a new tracker with the same thresholds and no open breaches."""
        return ThresholdTracker(self._thresholds, self.outbox)

    def threshold_of(self, queue: str) -> Threshold | None:
        if queue == OUTBOX:
            return self.outbox
        exact = self._thresholds.get(queue)
        if exact is not None:
            return exact
        return next((found for name, found in self._thresholds.items() if fnmatchcase(queue, name)), None)

    def transitions(self, reading: QueueReading) -> list[QueueAlert]:
        """Return the alerts for breaches that begin or end with this reading."""
        threshold = self.threshold_of(reading.queue)
        if threshold is None:
            return []
        found = []
        for measure, value, limit in threshold.measures(reading):
            breach = (reading.queue, measure)
            if breach not in self.open and value >= limit:
                self.open.add(breach)
                found.append(QueueAlert.of(reading.queue, measure, value, limit))
            elif breach in self.open and value <= limit * _DOWN:
                self.open.discard(breach)
                if threshold.notify_clear:
                    found.append(QueueAlert.of(reading.queue, measure, value, limit, cleared=True))
        return found


Notifier = Callable[[QueueAlert], object]
#: The type of ``on_alert``.
OnAlert = Literal["log", "sentry"] | Notifier | Sequence[Literal["log", "sentry"] | Notifier]


def notifiers(on_alert: OnAlert | None) -> list[Notifier]:
    """Return the notifiers. If one raises, the error is logged and the others still run.

    Raises:
      ConfigurationError: ``on_alert`` has an unknown name, or a callable that does not take an alert.
      ImportError: ``"sentry"``, and ``sentry_sdk`` is not installed.
    """
    if on_alert is None:
        on_alert = "log"
    several = on_alert if isinstance(on_alert, (list, tuple)) else [on_alert]
    return [_notifier(one) for one in several]


def _notifier(one: Any) -> Notifier:
    if one == "log":
        return _log
    if one == "sentry":
        return _to_sentry()
    if not is_sync_callable(one, 1):
        raise ConfigurationError.of_option(
            "QueueMonitor",
            "on_alert",
            "'log', 'sentry', a callable(alert) that is no coroutine function, or several",
            one,
        )

    def guarded(alert: QueueAlert) -> None:
        try:
            one(alert)
        except BaseException:  # Even SystemExit must not end the monitor.
            logger.exception("%r raised an error when called with the alert: %s", one, alert)

    return guarded


def _fields(alert: QueueAlert) -> dict[str, Any]:
    return {
        "queue": alert.queue,
        "measure": alert.measure,
        "value": alert.value,
        "threshold": alert.threshold,
        "cleared": alert.cleared,
    }


def _log(alert: QueueAlert) -> None:
    # WARNING, because the logging integration of Sentry makes an event of each ERROR.
    logger.log(logging.INFO if alert.cleared else logging.WARNING, "%s", alert, extra=_fields(alert))


def _to_sentry() -> Notifier:
    try:
        import sentry_sdk
    except ImportError as error:
        raise ImportError('on_alert="sentry" needs sentry-sdk: pip install "dramatiq-policies[sentry]"') from error

    def notify(alert: QueueAlert) -> None:
        with sentry_sdk.new_scope() as scope:
            scope.fingerprint = ["dramatiq_policies", "queue", alert.queue, alert.measure]
            scope.set_tag("queue", alert.queue)
            scope.set_tag("measure", alert.measure)
            scope.set_context("queue alert", _fields(alert))
            sentry_sdk.capture_message(str(alert), level="info" if alert.cleared else "error")

    return _notifier(notify)
