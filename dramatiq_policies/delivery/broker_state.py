"""What the parts of the bundle on one broker share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from ..common.forks import after_fork
from ..outcomes import Outcome, OutcomeEvent, Subscriber, logger
from .executor import AroundJob, Proceed, run_job
from .refusals import Distrust, Parking
from .validation import MAX_BODY_BYTES

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker, MessageProxy
    from dramatiq.middleware import Middleware

    from ..interrupts.slots import StuckListener
    from ..middleware.metrics import Metrics
    from ..middleware.shutdown import ShutdownNotifications
    from ..middleware.timeout import StuckJob, Timeout
    from .actor_policy import ActorPolicy
    from .delay_queue import DelayQueue
    from .delivery import Delivery

__all__ = ["BrokerState", "Observer", "state_of"]

P = ParamSpec("P")
T = TypeVar("T")

#: An observer of ours gets the message too (None if it could not be read).
Observer = Callable[[OutcomeEvent, "MessageProxy | None"], object]


class CompletionBatcher(Protocol):
    """Sends the completion of a job's key together with the claim of the next job."""

    def post(self, transport: Any, message: MessageProxy, delivery: Delivery) -> bool:
        """Take over the settlement of a plain success; False if the caller must settle it."""

    def look(self) -> None:
        """Send what was posted, unless another message is about to carry it."""

    def flush(self) -> None:
        """Send what was posted, and wait for the answers."""


class BrokerState:
    """The state of the bundle on one broker, in one process.

    Attributes:
      policies: The resolved options of each actor, by name.
      stopping: Set from the moment that the worker begins to shut down.
      delayed: The delayed messages in hand, by queue.
      in_flight: Redis: the ids taken and not yet acked, by queue.
      moving_delayed: Per thread, whether a due message is being moved out of the delay queue.
      refused: The queues whose dead letters the broker refuses now.
      distrusted: What a worker makes of bodies in a row that it cannot read, by queue.
      max_body_bytes: The largest body that is decoded, None for any.
      parked: Redis: the messages that keep their slots, since the broker takes them in no form, by queue.
      fatal: Why this process must not go on, None while it may.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.policies: dict[str, ActorPolicy] = {}
        self.max_body_bytes: int | None = MAX_BODY_BYTES
        self._shared: dict[object, object] = {}
        #: RabbitMQ: the message taken last from each queue. Kept only where a monitor reads it: None without one.
        self.last_received: dict[str, Message[Any]] | None = None
        #: When each consumer last asked its broker, in monotonic seconds. Kept only for a heartbeat: None without one.
        self.last_polled_at: dict[str, float] | None = None
        #: The middleware that says how long jobs may run, None without one.
        self.timeout: Timeout | None = None
        #: Learns of each job that goes on after its interrupt, None without Timeout.
        self.stuck_listener: StuckListener | None = None
        self._around_jobs: list[tuple[int, AroundJob]] = []
        #: Runs all that is around a job, and the job.
        self.run_around_job: Proceed = run_job
        #: Where numbers go, None without it.
        self.metrics: Metrics | None = None
        #: Called with each stuck job, on a thread of its own, before ``on_stuck``.
        self.stuck_subscribers: list[Callable[[StuckJob], object]] = []
        #: For how many milliseconds a due message stays in the delay queue; None moves it. None without Idempotency.
        self.postpone: Callable[[MessageProxy], int | None] | None = None
        #: What posts completions, None where that could be seen from outside.
        self.batched_completions: CompletionBatcher | None = None
        #: The ttl and max_crashes of the Idempotency, None without one that has a store.
        self.guard_defaults: tuple[int, int | None] | None = None
        #: Dramatiq's ShutdownNotifications, in our version.
        self.shutdown_notifications: ShutdownNotifications | None = None
        # What `ordering.order_middleware` has seen.
        self.arranged: list[Middleware] | None = None
        self.arranged_length = 0
        self.arranged_actors = 0
        self.attached: list[Middleware] = []
        self.attached_to_consume = False
        #: Alerts and stacks of one actor and error class are logged once in this time, in milliseconds.
        self.alert_interval = 0
        self.after_discard: tuple[Callable[[Any, BaseException], object], ...] = ()
        self._entries: list[tuple[object, Observer, bool]] = []
        self._observers: tuple[Observer, ...] = ()
        self._bad_observers: tuple[Observer, ...] = ()
        #: Whether a success needs a record at all.
        self.successes_observed = False
        #: Told of each success without a record: one costs as much as all that is done with it here.
        self.success_listeners: tuple[Callable[[Delivery], object], ...] = ()
        #: At which level the bundle logs a dead message, in place of the worker's line; None where it does not.
        self.failure_level: int | None = None
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process no worker runs and nothing is held."""
        self.stopping = threading.Event()
        self.delayed: dict[str, DelayQueue] = {}
        self.in_flight: dict[str, set[str]] = {}
        self.moving_delayed = threading.local()
        self.refused: dict[str, object] = {}
        self.parked: dict[str, Parking] = {}
        self.distrusted: dict[str, Distrust] = {}
        #: StubBroker: what is put back on its queue when the worker has shut down, and not before.
        self.requeue_after_shutdown: list[Callable[[], object]] = []
        #: RabbitMQ: how many messages the consumer of each queue holds.
        self.unacked_counts: dict[str, Callable[[], int]] = {}
        self.fatal: str | None = None
        self.in_command = False
        #: Until when, in monotonic seconds, no job begins that may be what kills its worker: Dramatiq's command waits for ever
        #: for a worker process that dies while it says that it has booted.
        self.booting_until = 0.0
        #: Taken by the consumer that says that this broker's storage is not known, and never given back.
        self.warned_of_unknown_broker = threading.Lock()
        for seen in (self.last_received, self.last_polled_at):
            if seen is not None:
                seen.clear()

    def add_around_job(self, around: AroundJob, *, order: int) -> None:
        """Run a callable around every job of this broker.

        Composed here, once, so that a message creates no closures.

        Parameters:
          order: A lower number runs outside of a higher one.
        """
        self._around_jobs = sorted([*self._around_jobs, (order, around)], key=lambda entry: entry[0])
        chain: Proceed = run_job
        for _, inner in reversed(self._around_jobs):
            chain = partial(inner, proceed=chain)
        self.run_around_job = chain

    def shared(self, kind: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the one object of a class that the transports of this broker share, made at the first call."""
        if kind not in self._shared:
            self._shared.setdefault(kind, kind(*args, **kwargs))
        return cast("T", self._shared[kind])

    def interrupted_by_shutdown(self, delivery: Delivery) -> bool:
        """Whether a worker's shutdown interrupts this delivery's job."""
        notifications = self.shutdown_notifications
        if notifications is None or delivery.policy is None:
            return False
        notify = delivery.message.options.get("notify_shutdown")
        if notify is None:
            notify = delivery.policy.options.get("notify_shutdown")
        return bool(notifications.notify_shutdown if notify is None else notify)

    def subscribe(self, owner: object, subscriber: Subscriber) -> None:
        """Hand every record to a callable of the user's."""
        self.observe(owner, lambda event, message: subscriber(event), subscriber)

    def observe(
        self, owner: object, observer: Observer, name: object = None, *, successes: bool = True, first: bool = False
    ) -> None:
        """Hand every record, or all but the successes, to an observer; what it raises is logged and changes nothing.

        ``owner`` is the middleware on whose behalf it observes. See `forget`. With ``first`` it comes before the others.
        """

        def guarded(event: OutcomeEvent, message: MessageProxy | None) -> None:
            try:
                observer(event, message)
            except BaseException:  # Not even an exit: it would end the worker's thread before the ack.
                logger.exception("The outcome subscriber %r failed; the message is not affected.", name or observer)

        self._entries.insert(0 if first else len(self._entries), (owner, guarded, successes))
        self._order_observers()

    def forget(self, owner: object) -> None:
        """Undo what was done on behalf of a middleware that another has replaced."""
        self._entries = [entry for entry in self._entries if entry[0] is not owner]
        self._order_observers()

    def _order_observers(self) -> None:
        self._bad_observers = tuple(observer for _, observer, _ in self._entries)
        self._observers = tuple(observer for _, observer, successes in self._entries if successes)
        self.successes_observed = bool(self._observers)

    def notify_success(self, delivery: Delivery) -> None:
        """Tell of a success before its ack; what is raised is logged and changes nothing."""
        for told in self.success_listeners:
            try:
                told(delivery)
            except BaseException:  # As above.
                logger.exception("%r failed; the message is not affected.", told)

    def publish(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        """Hand the record to those who asked for its kind."""
        for observer in self._observers if event.outcome is Outcome.SUCCEEDED else self._bad_observers:
            observer(event, message)


_ATTRIBUTE = "dramatiq_policies_wiring"
_lock = threading.Lock()


def state_of(broker: Broker) -> BrokerState:
    """The bundle's state on this broker, made at the first call."""
    state: BrokerState | None = vars(broker).get(_ATTRIBUTE)
    if state is None:
        with _lock:
            state = vars(broker).get(_ATTRIBUTE)
            if state is None:
                state = vars(broker)[_ATTRIBUTE] = BrokerState(broker)
    return state
