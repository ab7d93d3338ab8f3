"""Monitor the queues, and alert when a threshold is reached."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..brokers.readers import QueueReader, QueueReading, reader_of
from ..common.durations import CENTURY_MS, format_duration
from ..common.forks import after_fork
from ..common.middleware import find_middleware
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_duration
from ..observability.outbox_reader import OutboxReader
from ..observability.private_files import require_file_locks
from ..observability.queue_thresholds import OnAlert, QueueAlert, Threshold, ThresholdTracker, notifiers
from .background_thread import BackgroundThread
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState
    from ..observability.election import Election
    from ..observability.statsd import Statsd

__all__ = ["QueueAlert", "QueueMonitor", "Threshold"]

logger = SafeLogger("dramatiq_policies.alerts")

#: After this many failed readings in a row, the leader resigns.
_RESIGN_AFTER = 3


class QueueMonitor(PolicyMiddleware):
    """Read every queue at an interval, send gauges, and alert when a threshold is reached::

        install(
            broker,
            queue_monitor=QueueMonitor(
                thresholds={"mail": Threshold(oldest=timedelta(minutes=5)), "*": Threshold(ready=10_000, dead=1)},
                on_alert="sentry",
            ),
        )

    One worker process of each ``dramatiq`` command monitors the queues. With Redis (a RedisBroker, or Idempotency with a
    RedisStore) one process across all hosts does; another takes over within four intervals. All workers with the same queues in
    the same namespace elect the process together. A process that fails to read the queues three times in a row resigns. The
    monitor runs on a thread of its own while the worker runs. Readings take no message, and an outage of the broker does no harm:
    the outbox, where messages pile up meanwhile, is still read.

    The monitor alerts once per breach, and again only after the value has fallen to 80 % of the threshold.

    The gauges for StatsD are ``queues.<queue>.ready``, ``.delayed``, ``.dead``, ``.oldest_ms``, ``workers.busy``,
    ``workers.threads``, and with an outbox ``outbox.pending`` and ``outbox.oldest_ms``. With DogStatsD they are ``queues.ready``
    and so on, with the tag ``queue``. The ``workers`` gauges are sums over the processes of the command, with Redis over all hosts.

    Parameters:
      interval: The time between two readings, in milliseconds or as a ``timedelta``. Default 15 seconds.
      thresholds: A `Threshold` by queue name or by ``fnmatch`` pattern (``"mail.*"``). A queue's own name goes first, then the
        first pattern that matches. Put ``"*"`` last for all other queues.
      outbox: A `Threshold` for the outbox: ``ready`` limits the number of waiting messages, ``oldest`` the age of the oldest
        message. Default None: no alert.
      on_alert: The receiver of each `QueueAlert`: a callable, ``"log"`` (default: a WARNING on ``dramatiq_policies.alerts`` with
        fields in ``extra``), ``"sentry"``, or a list of these. Errors of a callable are logged.
      client: A client for the gauges, as for `Metrics`. Default None: the client of the broker's Metrics; without Metrics the
        monitor sends no gauges.
      queue_prefix: The prefix of queue gauges. Default None: that of Metrics, else ``"queues"``.
      in_workers: False if only ``dramatiq-policies monitor`` shall monitor, and no worker. Default True.

    Raises:
      ConfigurationError: An argument is wrong, or the platform has no ``fcntl`` (Windows).
    """

    def __init__(
        self,
        *,
        interval: int | timedelta = 15_000,
        thresholds: Mapping[str, Threshold] | None = None,
        outbox: Threshold | None = None,
        on_alert: OnAlert | None = None,
        client: Any = None,
        queue_prefix: str | None = None,
        in_workers: bool = True,
    ) -> None:
        require_file_locks("QueueMonitor")
        self.interval = checked_duration("QueueMonitor", "interval", interval, least=1, most=CENTURY_MS)
        if queue_prefix is not None and (type(queue_prefix) is not str or not queue_prefix):
            raise ConfigurationError.of_option("QueueMonitor", "queue_prefix", "a name", queue_prefix)
        self.queue_prefix = queue_prefix
        if not isinstance(in_workers, bool):
            raise ConfigurationError.of_option("QueueMonitor", "in_workers", "True or False", in_workers)
        self.in_workers = in_workers
        self._tracker = ThresholdTracker(thresholds, outbox)
        self._notifiers = notifiers(on_alert)
        #: Whether alerts are log records, which need a handler.
        self.logs_alerts = on_alert in (None, "log") or (isinstance(on_alert, (list, tuple)) and "log" in on_alert)
        self._statsd: Statsd | None = None
        if client is not None:
            from ..observability.statsd import Statsd

            self._statsd = Statsd(client)
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Forget the broker and its workers."""
        self._reader: QueueReader | None = None
        #: Held while reading: only one thread may use a reader.
        self._reading = threading.Lock()
        self._thread = BackgroundThread("queue-monitor", self.run_forever)
        self._watching = 0
        self._elected = False
        #: The number of failed readings in a row.
        self._failed = 0
        #: Whether this process has resigned, and leaves the next turn to the others.
        self._skips_turn = False
        self._outbox = OutboxReader()

    def for_stub(self) -> Self:
        stub = super().for_stub()
        stub.reset_after_fork()
        after_fork(stub)
        # A test calls `check`; no thread monitors.
        stub.in_workers = False
        vars(stub).update(_tracker=self._tracker.reset(), _statsd=None)
        return stub

    # In a worker.

    def attach(self, state: BrokerState) -> None:
        if self.in_workers:
            state.last_received = {}

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        if self.in_workers:
            self._thread.add_worker(worker)

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._thread.remove_worker(worker)

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._thread.join(2)

    # On the thread, and in ``dramatiq-policies monitor``.

    def run_forever(self, stop: threading.Event | None = None) -> None:
        """Monitor the queues on this thread until ``stop`` is set, whenever this process is the leader.

        Raises:
          ConfigurationError: The monitor is on no broker.
        """
        stop = threading.Event() if stop is None else stop
        from ..observability.fleet_election import elect

        election = elect(self._state(), self.interval)
        with self._reading:
            self._watching += 1
        try:
            while True:
                self._monitor_once(election)
                if stop.wait(self.interval / 1_000):
                    return
        finally:
            with self._reading:
                self._watching -= 1
                if self._reader is not None:
                    self._reader.close()
                self._elected = False
            election.resign()

    @property
    def outbox(self) -> Threshold | None:
        """The threshold of the outbox."""
        return self._tracker.outbox

    @property
    def thresholds(self) -> list[Threshold]:
        """The declared thresholds, in their order."""
        return self._tracker.thresholds

    def threshold_of(self, queue: str) -> Threshold | None:
        """Return the threshold of a queue."""
        return self._tracker.threshold_of(queue)

    def check(self) -> list[QueueAlert]:
        """Read every queue now, also without being the leader; send gauges and new alerts, and return the alerts.

        Raises:
          ConfigurationError: The monitor is on no broker.
          dramatiq.errors.ConnectionClosed: The server does not answer. Gauges and alerts of the outbox have been sent.
        """
        with self._reading:
            readings, found, error = self._read_and_compare()
            if not self._watching:
                # No thread of this monitor closes the reader later.
                self._get_reader().close()
        self._publish_readings(readings, found, error)
        return found

    def _monitor_once(self, election: Election) -> None:
        try:
            self._take_turn(election)
        except Exception as error:
            self._failed += 1
            if self._failed % _RESIGN_AFTER == 0 and self._elected:
                # Another process may reach the server: leave the next turn to the others.
                self._elected, self._skips_turn = False, True
                election.resign()
            if self._failed == 1:
                logger.error(  # noqa: TRY400  The stack is of no use: the server is down.
                    "The queues can't be read (%s: %s); trying again every %s.",
                    type(error).__name__,
                    error,
                    format_duration(self.interval),
                )
        else:
            # A process that left its turn to the others has read nothing.
            if self._failed and self._elected:
                self._failed = 0
                logger.info("The queues can be read again.")

    def _take_turn(self, election: Election) -> None:
        """Publish the report of this process. The leader then reads the queues, and sends alerts and gauges."""
        from ..observability.queue_gauges import worker_report

        with self._reading:
            reader = self._get_reader()
            election.publish({**reader.report(), **worker_report(self._thread.workers)})
            if not self._is_leader(election):
                return
            reader.peer_reports = reports = election.reports()
            open_before = set(self._tracker.open)
            readings, found, error = self._read_and_compare()
            if self._tracker.open != open_before:
                election.save(sorted(self._tracker.open))
        workers_known = election.hears_all or any("threads" in one for one in reports)
        self._publish_readings(readings, found, error, reports if workers_known else None)

    def _is_leader(self, election: Election) -> bool:
        """Whether this process is the leader. A new leader continues with the open breaches of the last one."""
        if self._skips_turn:
            self._skips_turn = False
            return False
        if not election.is_leader():
            self._elected = False
            return False
        if not self._elected:
            self._elected = True
            before = election.saved()
            if before is not None:
                self._tracker.open = {(str(queue), str(measure)) for queue, measure in before}
        return True

    def _read_and_compare(self) -> tuple[list[QueueReading], list[QueueAlert], Exception | None]:
        """Read the queues and the outbox. If the queues can't be read, returns the outbox's reading and the error."""
        reader = self._get_reader()
        error: Exception | None = None
        try:
            readings = reader.read_all()
        except Exception as failure:
            readings, error = [], failure
        outbox = self._outbox.read(reader.broker, self.interval)
        if outbox is not None:
            readings.append(outbox)
        return readings, [alert for reading in readings for alert in self._tracker.transitions(reading)], error

    def _publish_readings(
        self,
        readings: list[QueueReading],
        found: list[QueueAlert],
        error: Exception | None,
        reports: list[dict[str, Any]] | None = None,
    ) -> None:
        """Send alerts and gauges, and raise the error. ``reports`` are those of the workers; None if there may be others."""
        # Alerts first: they are saved as sent, so no other process would send them.
        for alert in found:
            for notify in self._notifiers:
                notify(alert)
        self._send(readings, reports)
        if error is not None:
            raise error

    def _send(self, readings: list[QueueReading], reports: list[dict[str, Any]] | None) -> None:
        from ..observability.queue_gauges import gauges_of, worker_gauges
        from .metrics import Metrics

        metrics = find_middleware(self._state().broker, Metrics)
        statsd, prefix = self._statsd, self.queue_prefix
        if metrics is not None:
            statsd = metrics.statsd if statsd is None else statsd
            prefix = metrics.queue_prefix if prefix is None else prefix
        if statsd is None:
            return
        values = gauges_of(readings, "queues" if prefix is None else prefix, tagged=statsd.tagged)
        statsd.send(values if reports is None else [*values, *worker_gauges(reports)])

    def _get_reader(self) -> QueueReader:
        broker = self._state().broker
        # In tests a StubBroker may hold the messages of these actors.
        broker = vars(broker).get("dramatiq_policies_lent_to", broker)
        if self._reader is not None and self._reader.broker is not broker:
            self._reader.close()
            self._reader, self._tracker = None, self._tracker.reset()
        if self._reader is None:
            self._reader = reader_of(broker)
        return self._reader

    def _state(self) -> BrokerState:
        if self.attached_to is None:
            raise ConfigurationError("This QueueMonitor is on no broker. Did you forget to call install(broker, …)?")
        return self.attached_to
