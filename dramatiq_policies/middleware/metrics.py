"""What became of each delivery, as numbers on a StatsD server."""

from __future__ import annotations

from time import monotonic, time
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.middleware import Shutdown, TimeLimitExceeded

from .._job_errors import is_a
from ..delivery.delivery import READY_AT
from ..errors import ConfigurationError, Snooze
from ..observability.statsd import Statsd, Value, metric_name, tag_list
from ..outcomes import Outcome, OutcomeEvent
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker, MessageProxy
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState
    from ..delivery.delivery import Delivery
    from .timeout import StuckJob

__all__ = ["Metrics"]

#: What each outcome is counted as.
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
#: More actors, queues and outcomes than any app has: who sends messages for unknown actors must not fill the memory.
_MOST_NAMES = 10_000


class _Names(NamedTuple):
    """What does not change between two deliveries of one actor that end alike."""

    duration: str
    wait: str
    tags: tuple[str, ...]
    counted: Value


class Nowhere:
    """A StatsD client that sends nothing."""

    def incr(self, *args: Any, **kwargs: Any) -> None: ...

    timing = gauge = incr


class Metrics(PolicyMiddleware):
    """Counts how deliveries end, and times how long jobs waited and ran.

    A delivery's values leave in one datagram, after its hand-off. With a StatsD client they are called
    ``jobs.<actor>.duration`` (ms, every run), ``.wait`` (ms from ready to started), ``.success``, ``.failure`` (every run
    that raised, beside its outcome), ``.retry``, ``.discard``, ``.alert``, ``.dead``, ``.duplicate``, ``.deferred``,
    ``.expired``, ``.interrupted``, ``.skipped``, ``.timeout`` (every run that was timed out) and ``.stuck``. With a
    DogStatsD client they are ``jobs.duration`` and so on, with the tags ``actor``, ``queue``, ``outcome`` and the
    actor's own. A verdict that the job raises to be put off, ``Snooze``, and the interrupt of a shutdown are no failures.

    A server that is dead, slow or can't be found never blocks, slows or fails a job, and is said once.

    Parameters:
      client: A ``statsd.StatsClient`` or DogStatsD client, or any object with the methods of one (`Statsd` says which).
        None, the default, for UDP to ``STATSD_HOST`` and ``STATSD_PORT``, else localhost:8125.
      prefix: What the names of jobs begin with. Default ``"jobs"``.
      queue_prefix: What the names of queues' gauges begin with, which a QueueMonitor reads. Default ``"queues"``.

    Attributes:
      statsd: Where the values go, a `Statsd`; another may be put in its place.

    Raises:
      ConfigurationError: An argument makes no sense.
      ImportError: There is no client, and the ``statsd`` package is not installed.
    """

    def __init__(self, client: Any = None, prefix: str = "jobs", queue_prefix: str = "queues") -> None:
        prefixes: dict[str, Any] = {"prefix": prefix, "queue_prefix": queue_prefix}
        for option, value in prefixes.items():
            if not isinstance(value, str) or not value or metric_name(value) != value:
                raise ConfigurationError.of_option("Metrics", option, "a metric's name, such as 'jobs'", value)
        self.statsd = Statsd(client)
        self.prefix = prefix
        self.queue_prefix = queue_prefix
        self._wiring: BrokerState | None = None
        self._names: dict[tuple[str | None, str | None, Outcome, bool], _Names] = {}
        #: What a success says, by its actor, but for the two times.
        self._lines: dict[str, str] = {}

    def attach(self, state: BrokerState) -> None:
        self._wiring = state
        state.metrics = self
        state.observe(self, self._record, self, successes=False)
        state.success_listeners = (*state.success_listeners, self._succeeded)
        state.stuck_subscribers.append(self._stuck)

    def for_stub(self) -> Self:
        twin = super().for_stub()
        # Nothing is sent; the test kit looks at the values on their way.
        twin.statsd = Statsd(Nowhere())
        vars(twin).update(_wiring=None, _names={}, _lines={})
        return twin

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self.statsd.flush()

    def _succeeded(self, delivery: Delivery) -> None:
        """On every successful message's way: no record, no names put together, no list of values."""
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
        """What is sent of one delivery."""
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

    def _name_of(self, actor: str | None, what: str) -> str:
        return f"{self.prefix}.{what}" if self.statsd.tagged else f"{self.prefix}.{metric_name(actor)}.{what}"

    def _stuck(self, job: StuckJob) -> None:
        policy = None if self._wiring is None else self._wiring.policies.get(job.actor)
        own = {} if policy is None or policy.tags is None else policy.tags
        tags = tag_list({**own, "actor": job.actor, "queue": job.queue})
        self.statsd.send([("c", self._name_of(job.actor, "stuck"), 1, tags)])
        # The process may be about to end.
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
    """Whether the exception is the job's own, and one that speaks of a failure."""
    return (
        event.duration_ms is not None
        and event.reason != "handoff_failed"
        and event.outcome not in (Outcome.DEFERRED, Outcome.INTERRUPTED)
        and not is_a(event.exception, (Snooze, Shutdown))
    )
