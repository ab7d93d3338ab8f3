"""Watches the queues, and warns before one is late."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..brokers.readers import QueueReader, QueueReading, reader_of
from ..common.durations import CENTURY_MS
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_duration
from ..observability.private_files import require_file_locks
from ..observability.queue_thresholds import OnAlert, QueueAlert, Threshold, ThresholdTracker, notifiers
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState
    from ..observability.election import Election
    from ..observability.statsd import Statsd, Value

__all__ = ["QueueAlert", "QueueMonitor", "Threshold"]

logger = SafeLogger("dramatiq_policies.alerts")

#: After so many readings in a row that fail, the elected one lets another try.
_PATIENCE = 3


class QueueMonitor(PolicyMiddleware):
    """Reads every queue at an interval, sends gauges, and tells when a threshold is reached.

    One process of each ``dramatiq`` command does it, elected among the command's worker processes; where Redis is at
    hand (a RedisBroker, or Idempotency with a RedisStore) one process of the whole fleet, by a lease that another takes
    over within four intervals. The fleet is whoever has the same queues in the same namespace. One that can't read the
    queues three times in a row lets another try. A thread is started when a worker boots, and ends with it; no reading
    takes a message, nor does an outage of the broker end anything.

    A breach is told once, and again only after its value has come down to four fifths of the threshold.

    Gauges, by a client of StatsD or DogStatsD: ``queues.<queue>.ready``, ``.delayed``, ``.dead``, ``.oldest_ms`` (with
    tags: ``queues.ready`` and so on, tag ``queue``), and ``workers.busy`` and ``workers.threads``, the sums over all
    processes that can let the elected one know: those of its command, with Redis those of the fleet.

    Parameters:
      interval: Between two readings, in milliseconds or as a ``timedelta``. Default 15 seconds.
      thresholds: A `Threshold` by queue name, or by a pattern as in ``fnmatch`` (``"mail.*"``). A queue's own name counts
        first, then the first pattern that matches; ``"*"`` last is for all others.
      on_alert: Who gets each `QueueAlert`: a callable, ``"log"`` (the default: a WARNING on
        ``dramatiq_policies.alerts``, with its fields in ``extra``), ``"sentry"``, or a list of these. What a callable
        raises is logged.
      client: Where the gauges go, as in `Metrics`. None, the default: where those of the broker's Metrics go; without
        Metrics nowhere.
      queue_prefix: What the names of the queues' gauges begin with. None, the default: as Metrics says, else
        ``"queues"``.
      in_workers: False if only ``dramatiq-policies monitor`` is to watch, and no worker.

    Raises:
      ConfigurationError: An argument makes no sense, or the platform has no ``fcntl`` (Windows).
    """

    def __init__(
        self,
        *,
        interval: int | timedelta = 15_000,
        thresholds: Mapping[str, Threshold] | None = None,
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
        self._tracker = ThresholdTracker(thresholds)
        self._notifiers = notifiers(on_alert)
        #: Whether alerts are log records: a WARNING that somebody must hear.
        self.logs_alerts = on_alert in (None, "log") or (isinstance(on_alert, (list, tuple)) and "log" in on_alert)
        self._statsd: Statsd | None = None
        if client is not None:
            from ..observability.statsd import Statsd

            self._statsd = Statsd(client)
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Forget what belongs to a broker and its workers."""
        self._reader: QueueReader | None = None
        #: Held while reading: a reader belongs to one thread at a time.
        self._reading = threading.Lock()
        self._workers: list[Worker] = []
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self._watching = 0
        self._elected = False
        #: Readings in a row that have failed.
        self._failed = 0
        self._stands_back = False

    def for_stub(self) -> Self:
        twin = super().for_stub()
        twin.reset_after_fork()
        after_fork(twin)
        # In a test it is asked by `check`, and watches nothing by itself.
        twin.in_workers = False
        vars(twin).update(_tracker=self._tracker.reset(), _statsd=None)
        return twin

    # In a worker.

    def attach(self, state: BrokerState) -> None:
        if self.in_workers:
            state.last_received = {}

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        if not self.in_workers:
            return
        self._workers.append(worker)
        if self._thread is None:
            # A fresh event for each thread: one that ends late must not see that another has begun.
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self.run_forever, args=(self._stop,), name="dramatiq_policies.queue_monitor", daemon=True
            )
            self._thread.start()

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        if not self._workers and self._stop is not None:
            self._stop.set()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if not self._workers and self._thread is not None:
            # A reading may wait for a server that is not there; the thread ends by itself then.
            self._thread.join(2)
            self._thread = None

    # What the thread does, and ``dramatiq-policies monitor``.

    def run_forever(self, stop: threading.Event | None = None) -> None:
        """Watch the queues on this thread, while this process is elected, until ``stop`` is set.

        Raises:
          ConfigurationError: If the monitor is on no broker yet.
        """
        stop = threading.Event() if stop is None else stop
        from ..observability.election import elect

        election = elect(self._wiring(), self.interval)
        with self._reading:
            self._watching += 1
        try:
            while True:
                self._turn(election)
                if stop.wait(self.interval / 1_000):
                    return
        finally:
            with self._reading:
                self._watching -= 1
                if self._reader is not None:
                    self._reader.close()
                self._elected = False
            election.resign()

    def threshold_of(self, queue: str) -> Threshold | None:
        """The threshold that counts for a queue."""
        return self._tracker.threshold_of(queue)

    def check(self) -> list[QueueAlert]:
        """Read every queue now, whoever is elected, send its gauges, tell what is new, and return it.

        Raises:
          ConfigurationError: If the monitor is on no broker yet.
          dramatiq.errors.ConnectionClosed: If the server can't be read.
        """
        with self._reading:
            readings, found = self._look()
            if not self._watching:
                # Nobody else would close it.
                self._get_reader().close()
        self._send(readings, [], False)
        self._tell(found)
        return found

    def _turn(self, election: Election) -> None:
        try:
            with self._reading:
                reader = self._get_reader()
                note: dict[str, Any] = reader.report()
                if self._workers:
                    note["threads"] = sum(worker.worker_threads for worker in self._workers)
                    note["busy"] = sum(_busy(worker) for worker in self._workers)
                election.publish(note)
                if self._stands_back:
                    self._stands_back = False
                    return
                if not election.is_leader():
                    self._elected = False
                    return
                if not self._elected:
                    self._elected = True
                    before = election.saved()
                    if before is not None:
                        self._tracker.open = {(str(queue), str(measure)) for queue, measure in before}
                notes = election.reports()
                reader.peer_reports = notes
                open_before = set(self._tracker.open)
                readings, found = self._look()
                if self._tracker.open != open_before:
                    election.save(sorted(self._tracker.open))
            # First: what was told is remembered as told, and nobody else would tell it.
            self._tell(found)
            self._send(readings, notes, election.hears_all or any("threads" in note for note in notes))
        except Exception as error:
            self._failed += 1
            if self._failed % _PATIENCE == 0 and self._elected:
                # Another process may reach the server: for one turn it is theirs to ask.
                self._elected, self._stands_back = False, True
                election.resign()
            if self._failed == 1:
                logger.error(  # noqa: TRY400  Its stack says nothing: a server is not there.
                    "The queues can't be read (%s: %s); trying again every %d ms.",
                    type(error).__name__,
                    error,
                    self.interval,
                )
        else:
            if self._failed:
                self._failed = 0
                logger.info("The queues are read again.")

    def _look(self) -> tuple[list[QueueReading], list[QueueAlert]]:
        readings = self._get_reader().read_all()
        return readings, [alert for reading in readings for alert in self._tracker.transitions(reading)]

    def _tell(self, found: list[QueueAlert]) -> None:
        for alert in found:
            for notify in self._notifiers:
                notify(alert)

    def _send(self, readings: list[QueueReading], notes: list[dict[str, Any]], workers_known: bool) -> None:
        from ..observability.statsd import metric_name, tag_list

        metrics = self._wiring().metrics
        statsd, queues = self._statsd, self.queue_prefix
        if metrics is not None:
            statsd = metrics.statsd if statsd is None else statsd
            queues = metrics.queue_prefix if queues is None else queues
        if statsd is None:
            return
        queues = "queues" if queues is None else queues
        values: list[Value] = []
        for reading in readings:
            prefix = queues if statsd.tagged else f"{queues}.{metric_name(reading.queue)}"
            tags = tag_list({"queue": reading.queue})
            for name in ("ready", "delayed", "dead", "oldest_ms"):
                value = getattr(reading, name)
                if value is not None:
                    values.append(("g", f"{prefix}.{name}", value, tags))
        if workers_known:
            values += [
                ("g", f"workers.{name}", sum(note.get(name, 0) for note in notes), ()) for name in ("busy", "threads")
            ]
        statsd.send(values)

    def _get_reader(self) -> QueueReader:
        broker = self._wiring().broker
        # While its actors are lent to a StubBroker, in tests, the messages are there.
        broker = vars(broker).get("dramatiq_policies_lent_to", broker)
        if self._reader is not None and self._reader.broker is not broker:
            self._reader.close()
            self._reader, self._tracker = None, self._tracker.reset()
        if self._reader is None:
            self._reader = reader_of(broker)
        return self._reader

    def _wiring(self) -> BrokerState:
        if self.attached_to is None:
            raise ConfigurationError("This QueueMonitor is on no broker yet. Did you forget to install the bundle?")
        return self.attached_to


def _busy(worker: Worker) -> int:
    """How many of the worker's threads are at a message: those taken from its queue and not done."""
    return max(0, worker.work_queue.unfinished_tasks - worker.work_queue.qsize())
