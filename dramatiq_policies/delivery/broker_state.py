"""The shared state of a broker's middleware and transports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from ..common.forks import after_fork
from ..outcomes import Outcome, OutcomeEvent, StuckJob, Subscriber, logger
from .executor import AroundJob, Proceed, run_job
from .refusals import Distrust, Parking
from .validation import MAX_BODY_BYTES

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker, MessageProxy
    from dramatiq.middleware import Middleware

    from ..interrupts.slots import StuckListener
    from .actor_policy import ActorPolicy
    from .delay_queue import DelayQueue
    from .delivery import Delivery

__all__ = ["BrokerState", "Observer", "state_of"]

P = ParamSpec("P")
T = TypeVar("T")

#: A callable of ours, called with an outcome and its message (None if the message could not be read).
Observer = Callable[[OutcomeEvent, "MessageProxy | None"], object]


class CompletionBatcher(Protocol):
    """Sends the completion of a job's key together with the claim of the next job."""

    def post(self, transport: Any, message: MessageProxy, delivery: Delivery) -> bool:
        """Take over the settlement of a plain success. Returns False if the caller must settle the message."""

    def look(self) -> None:
        """Send the posted completions, unless another message is about to send them."""

    def flush(self) -> None:
        """Send the posted completions, and wait for the replies."""


class TimeLimits(Protocol):
    """The part of Timeout that other packages read."""

    @property
    def on_stuck(self) -> object: ...

    def resolve(self, options: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Return an actor's timeout and queue timeout in milliseconds, None for none."""

    def still_stuck(self) -> list[Delivery]:
        """Return the reported jobs that still run."""


class ShutdownDefault(Protocol):
    """The part of ShutdownNotifications that other packages read."""

    notify_shutdown: bool


class BrokerState:
    """The state of dramatiq_policies on a broker, in this process.

    Attributes:
      policies: The resolved options of each actor, by name.
      stopping: Set as soon as the worker begins to shut down.
      delayed: The delayed messages in this process, by queue.
      in_flight: On Redis, the ids of received messages not yet acknowledged, by queue.
      moving_delayed: Per thread, whether a due message is being moved out of the delay queue.
      refused: The queues for which the broker currently refuses dead letters.
      distrusted: Counts unreadable bodies in a row and pauses after too many, by queue.
      max_body_bytes: The size of the largest body to decode; None for no limit.
      parked: The messages that keep their slots because the broker accepts them in no form, by queue.
      fatal: The error because of which this process must end; None if all is well.
      in_command: Whether this process belongs to Dramatiq's command.
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.policies: dict[str, ActorPolicy] = {}
        self.max_body_bytes: int | None = MAX_BODY_BYTES
        self._shared: dict[object, object] = {}
        #: On RabbitMQ, the last message received from each queue. None unless a monitor reads them.
        self.last_received: dict[str, Message[Any]] | None = None
        #: When each consumer last asked the broker, in monotonic seconds. None unless a heartbeat reads the times.
        self.last_polled_at: dict[str, float] | None = None
        #: The Timeout middleware; None without one.
        self.timeout: TimeLimits | None = None
        #: Receives each job still running after an interrupt; None without Timeout.
        self.stuck_listener: StuckListener | None = None
        self._around_jobs: list[tuple[int, AroundJob]] = []
        #: Runs a job, with all callables around the job.
        self.run_around_job: Proceed = run_job
        #: Called with each stuck job before ``on_stuck``, on a separate thread.
        self.stuck_subscribers: list[Callable[[StuckJob], object]] = []
        #: Returns how many milliseconds a due message must stay in the delay queue, or None to move the message now. Set by
        #: Idempotency; None without Idempotency.
        self.postpone: Callable[[MessageProxy], int | None] | None = None
        #: Batches completions; None if batching would be visible from outside.
        self.batched_completions: CompletionBatcher | None = None
        #: The ttl and max_crashes of the Idempotency middleware; None without the middleware, or without a store.
        self.guard_defaults: tuple[int, int | None] | None = None
        #: Our subclass of Dramatiq's ShutdownNotifications.
        self.shutdown_notifications: ShutdownDefault | None = None
        # The middleware and the actors at the last call of `ordering.order_middleware`.
        self.arranged: list[Middleware] | None = None
        self.arranged_length = 0
        self.arranged_actors = 0
        self.attached: list[Middleware] = []
        self.attached_to_consume = False
        #: In milliseconds: alerts and stacks of one actor and error class are logged at most once per interval.
        self.alert_interval = 0
        self.after_discard: tuple[Callable[[Any, BaseException], object], ...] = ()
        self._entries: list[tuple[object, Observer, bool]] = []
        self._observers: tuple[Observer, ...] = ()
        self._bad_observers: tuple[Observer, ...] = ()
        #: Whether a success needs a record at all.
        self.successes_observed = False
        #: Called on success with the Delivery; skips building an OutcomeEvent.
        self.success_listeners: tuple[Callable[[Delivery], object], ...] = ()
        #: The level at which dramatiq_policies logs a dead message, in place of the worker's line; None for no log.
        self.failure_level: int | None = None
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start empty: in a new process no worker runs, and no message was received."""
        self.stopping = threading.Event()
        self.delayed: dict[str, DelayQueue] = {}
        self.in_flight: dict[str, set[str]] = {}
        self.moving_delayed = threading.local()
        self.refused: dict[str, object] = {}
        self.parked: dict[str, Parking] = {}
        self.distrusted: dict[str, Distrust] = {}
        #: On StubBroker, the calls that requeue messages after the worker has shut down, and not before.
        self.requeue_after_shutdown: list[Callable[[], object]] = []
        #: On RabbitMQ, returns how many messages the consumer of each queue holds.
        self.unacked_counts: dict[str, Callable[[], int]] = {}
        self.fatal: str | None = None
        self.in_command = False
        #: Before this time (monotonic seconds) no redelivered job begins, since the job may have killed its worker. Dramatiq's
        #: command waits forever if a worker process dies during the report of its boot.
        self.booting_until = 0.0
        #: Acquired and never released by the first consumer that logs an unknown broker, so that a process logs once.
        self.warned_of_unknown_broker = threading.Lock()
        for seen in (self.last_received, self.last_polled_at):
            if seen is not None:
                seen.clear()

    def add_around_job(self, around: AroundJob, *, order: int) -> None:
        """Run a callable around every job of this broker.

        The chain is built here, once: per message, no closure is created.

        Parameters:
          order: Lower numbers run outside of higher numbers.
        """
        self._around_jobs = sorted([*self._around_jobs, (order, around)], key=lambda entry: entry[0])
        chain: Proceed = run_job
        for _, inner in reversed(self._around_jobs):
            chain = partial(inner, proceed=chain)
        self.run_around_job = chain

    def shared(self, kind: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the object of a class that all transports of this broker share. The first call makes the object."""
        if kind not in self._shared:
            self._shared.setdefault(kind, kind(*args, **kwargs))
        return cast("T", self._shared[kind])

    def interrupted_by_shutdown(self, delivery: Delivery) -> bool:
        """Whether the shutdown of the worker interrupts the job of this delivery."""
        notifications = self.shutdown_notifications
        if notifications is None or delivery.policy is None:
            return False
        notify = delivery.message.options.get("notify_shutdown")
        if notify is None:
            notify = delivery.policy.options.get("notify_shutdown")
        return bool(notifications.notify_shutdown if notify is None else notify)

    def subscribe(self, owner: object, subscriber: Subscriber) -> None:
        """Call a user's callable with every outcome."""
        self.observe(owner, lambda event, message: subscriber(event), subscriber)

    def observe(
        self, owner: object, observer: Observer, name: object = None, *, successes: bool = True, first: bool = False
    ) -> None:
        """Call an observer with every outcome. An error of the observer is logged and changes nothing.

        Parameters:
          owner: The middleware that observes; see `forget`.
          name: The observer's name in the log; the observer itself if None.
          successes: False leaves out successes.
          first: Call this observer before the others.
        """

        def guarded(event: OutcomeEvent, message: MessageProxy | None) -> None:
            try:
                observer(event, message)
            except BaseException:  # Not even an exit: it would end the worker's thread before the ack.
                logger.exception(
                    "The outcome subscriber %r raised an error; the message is not affected.", name or observer
                )

        self._entries.insert(0 if first else len(self._entries), (owner, guarded, successes))
        self._order_observers()

    def forget(self, owner: object) -> None:
        """Remove the observers of a middleware that another middleware has replaced."""
        self._entries = [entry for entry in self._entries if entry[0] is not owner]
        self._order_observers()

    def _order_observers(self) -> None:
        self._bad_observers = tuple(observer for _, observer, _ in self._entries)
        self._observers = tuple(observer for _, observer, successes in self._entries if successes)
        self.successes_observed = bool(self._observers)

    def notify_success(self, delivery: Delivery) -> None:
        """Call the success listeners before the acknowledgement. An error of a listener is logged and changes nothing."""
        for told in self.success_listeners:
            try:
                told(delivery)
            except BaseException:  # As above.
                logger.exception("%r raised an error; the message is not affected.", told)

    def publish(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        """Call the observers of this kind of outcome."""
        for observer in self._observers if event.outcome is Outcome.SUCCEEDED else self._bad_observers:
            observer(event, message)


_ATTRIBUTE = "dramatiq_policies_wiring"
_lock = threading.Lock()


def state_of(broker: Broker) -> BrokerState:
    """Return the state on this broker. The first call makes the state."""
    state: BrokerState | None = vars(broker).get(_ATTRIBUTE)
    if state is None:
        with _lock:
            state = vars(broker).get(_ATTRIBUTE)
            if state is None:
                state = vars(broker)[_ATTRIBUTE] = BrokerState(broker)
    return state
