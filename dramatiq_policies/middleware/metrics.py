"""Send the outcome and the times of each delivery to a StatsD server."""

from __future__ import annotations

from time import monotonic, time
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.middleware import Shutdown, TimeLimitExceeded

from .._job_errors import is_a
from ..delivery.delivery import READY_AT
from ..errors import ConfigurationError, Snooze
from ..observability.statsd import Statsd, Value, metric_name, tag_list
from ..outcomes import Outcome, OutcomeEvent, StuckJob
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker, MessageProxy
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState
    from ..delivery.delivery import Delivery

__all__ = ["Metrics"]

#: The counter of each outcome.
COUNTERS = {
    Outcome.SUCCEEDED: "success",
    Outcome.RETRIED: "retry",
    Outcome.DISCARDED: "discard",
    Outcome.ALERTED: "alert",
    Outcome.DEAD: "dead",
    Outcome.DUPLICATE: "duplicate",
    Outcome.DEFERRED: "deferred",
    Outcome.EXPIRED: "expired",
    Outcome.INTERRUPTED: "interrupted",
    Outcome.SKIPPED: "skipped",
}
#: The most cached names, more than any application needs: messages for unknown actors must not fill the memory.
_MOST_NAMES = 10_000


class _Names(NamedTuple):
    """The names and tags shared by deliveries of one actor with the same outcome."""

    duration: str
    wait: str
    tags: tuple[str, ...]
    counted: Value


class Nowhere:
    """A StatsD client that sends nothing."""

    def incr(self, *args: Any, **kwargs: Any) -> None: ...

    timing = gauge = incr


class Metrics(PolicyMiddleware):
    """Count outcomes, and time how long jobs waited and ran, with StatsD or DogStatsD::

        install(broker, metrics=Metrics(statsd.StatsClient("statsd.internal"), prefix="shop.jobs"))

    The worker sends the values of a delivery in one datagram, after the follow-up messages are published. With a StatsD client
    the names are ``jobs.<actor>.duration`` (ms, each run), ``.wait`` (ms from ready to started), ``.success``, ``.failure`` (each
    run that raised, in addition to its outcome), ``.retry``, ``.discard``, ``.alert``, ``.dead``, ``.duplicate``, ``.deferred``,
    ``.expired``, ``.interrupted``, ``.skipped``, ``.timeout`` (each run that timed out) and ``.stuck``. With a DogStatsD client
    the names are ``jobs.duration`` and so on, with the tags ``actor``, ``queue``, ``outcome`` and the actor's ``tags``. A `Snooze`
    and the interrupt of a shutdown are no failures.

    A StatsD server that is down or slow never blocks, slows or fails a job; the worker logs one line about the server.

    Parameters:
      client: A ``statsd.StatsClient``, a DogStatsD client, or an object with the same methods (see `Statsd`). Default None:
        UDP to ``STATSD_HOST`` and ``STATSD_PORT``, else to localhost:8125.
      prefix: The prefix of job metrics. Default ``"jobs"``.
      queue_prefix: The prefix of queue gauges, for a QueueMonitor. Default ``"queues"``.

    Attributes:
      statsd: Sends the values. You may assign another `Statsd`.

    Raises:
      ConfigurationError: An argument is wrong.
      ImportError: No client is given, and the ``statsd`` package is not installed.
    """

    def __init__(self, client: Any = None, prefix: str = "jobs", queue_prefix: str = "queues") -> None:
        prefixes: dict[str, Any] = {"prefix": prefix, "queue_prefix": queue_prefix}
        for option, value in prefixes.items():
            if not isinstance(value, str) or not value or metric_name(value) != value:
                raise ConfigurationError.of_option("Metrics", option, "a metric's name, such as 'jobs'", value)
        self.statsd = Statsd(client)
        self.prefix = prefix
        self.queue_prefix = queue_prefix
        self._state: BrokerState | None = None
        self._names: dict[tuple[str | None, str | None, Outcome, bool], _Names] = {}
        #: The text of a success by actor, with places for the two times.
        self._lines: dict[str, str] = {}

    def attach(self, state: BrokerState) -> None:
        self._state = state
        state.outcomes.observe(self, self._record, self, successes=False)
        state.outcomes.success_listeners = (*state.outcomes.success_listeners, self._succeeded)
        state.outcomes.stuck_subscribers.append(self._stuck)

    def for_stub(self) -> Self:
        stub = super().for_stub()
        # Sends nothing; the test kit records the values before.
        stub.statsd = Statsd(Nowhere())
        vars(stub).update(_state=None, _names={}, _lines={})
        return stub

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self.statsd.flush()

    def _succeeded(self, delivery: Delivery) -> None:
        """Send the values of a success. Runs for every successful message: no record, no joined names, no list."""
        statsd, message = self.statsd, delivery.message
        started, ended = delivery.started, delivery.ended
        ready = message.options.get(READY_AT)
        if ready is None or started is None or ended is None or not statsd.takes_text:
            self._record(_success_of(delivery), None)
            return
        lines = self._lines.get(message.actor_name)
        if lines is None:
            name = f"{self.prefix}.{metric_name(message.actor_name)}"
            lines = f"{name}.duration:%.3f|ms\n{name}.wait:%.3f|ms\n{name}.success:1|c"
            self._lines[message.actor_name] = lines
        wait = (time() - monotonic() + started) * 1_000 - ready
        statsd.send_text(lines % ((ended - started) * 1_000, max(0, wait)))

    def _record(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        self.statsd.send(self.values_of(event))

    def values_of(self, event: OutcomeEvent) -> list[Value]:
        """Return the values of one delivery."""
        key = (event.actor, event.queue, event.outcome, self.statsd.tagged)
        names = self._names.get(key)
        if names is None:
            names = self._name(event, key)
        values: list[Value] = []
        if event.duration_ms is not None:
            values.append(("ms", names.duration, round(event.duration_ms, 3), names.tags))
        if event.wait_ms is not None:
            values.append(("ms", names.wait, round(event.wait_ms, 3), names.tags))
        values.append(names.counted)
        if event.exception is not None and _raised(event):
            values.append(("c", self._name_of(event.actor, "failure"), 1, names.tags))
            if is_a(event.exception, TimeLimitExceeded):
                values.append(("c", self._name_of(event.actor, "timeout"), 1, names.tags))
        return values

    def _name(self, event: OutcomeEvent, key: tuple[str | None, str | None, Outcome, bool]) -> _Names:
        tags: tuple[str, ...] = ()
        if self.statsd.tagged:
            own = event.tags or {}
            tags = tuple(tag_list({**own, "actor": event.actor, "queue": event.queue, "outcome": event.outcome.value}))
        if len(self._names) >= _MOST_NAMES:
            self._names.clear()
        counted: Value = ("c", self._name_of(event.actor, COUNTERS[event.outcome]), 1, tags)
        names = self._names[key] = _Names(
            self._name_of(event.actor, "duration"), self._name_of(event.actor, "wait"), tags, counted
        )
        return names

    def _name_of(self, actor: str | None, measure: str) -> str:
        return f"{self.prefix}.{measure}" if self.statsd.tagged else f"{self.prefix}.{metric_name(actor)}.{measure}"

    def _stuck(self, job: StuckJob) -> None:
        policy = None if self._state is None else self._state.policies.get(job.actor)
        own = {} if policy is None or policy.tags is None else policy.tags
        tags = tag_list({**own, "actor": job.actor, "queue": job.queue})
        self.statsd.send([("c", self._name_of(job.actor, "stuck"), 1, tags)])
        # The process may end at once.
        self.statsd.flush()


def _success_of(delivery: Delivery) -> OutcomeEvent:
    policy = delivery.policy
    return OutcomeEvent(
        outcome=Outcome.SUCCEEDED,
        actor=delivery.message.actor_name,
        queue=delivery.transport.queue_name,
        wait_ms=delivery.waited_ms(),
        duration_ms=None if delivery.started is None else delivery.elapsed_ms(),
        tags=None if policy is None else policy.tags,
    )


def _raised(event: OutcomeEvent) -> bool:
    """Return whether the exception is the job's own, and a failure."""
    return (
        event.duration_ms is not None
        and event.reason != "handoff_failed"
        and event.outcome not in (Outcome.DEFERRED, Outcome.INTERRUPTED)
        and not is_a(event.exception, (Snooze, Shutdown))
    )
