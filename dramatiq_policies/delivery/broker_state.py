"""The shared state of a broker's middleware and transports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from ..common.forks import after_fork
from ..interrupts.slots import StuckListener
from .executor import AroundJob, Proceed, run_job
from .outcome_publisher import OutcomePublisher
from .queue_state import QueueState
from .validation import MAX_BODY_BYTES

if TYPE_CHECKING:
    from dramatiq import Actor, Message
    from dramatiq.broker import Broker, MessageProxy

    from ..common.current import Job
    from .actor_policy import ActorPolicy, IdempotencyOptions
    from .decision import Decision
    from .delivery import Delivery
    from .outgoing import OutgoingMessage

__all__ = ["BrokerState", "DeliverySettings", "IdempotencyState", "state_of"]

P = ParamSpec("P")
T = TypeVar("T")


class CompletionBatcher(Protocol):
    """Sends the completion of a job's key together with the claim of the next job: `BatchedCompletions`."""

    def post(self, message: MessageProxy, delivery: Delivery) -> bool:
        """Take over the settlement of a plain success. Returns False if the caller must settle the message."""

    def flush_if_idle(self) -> None:
        """Send the posted completions, unless another message is about to send them."""

    def flush(self) -> None:
        """Send the posted completions, and wait for the replies."""


class ClaimKeeper(Protocol):
    """Writes the claims of deliveries to a store: `Claims`.

    The argument ``claim`` is a delivery's claim. Its type is Any, because the keeper takes no other claims than its own, and this
    package knows them only as `KeyClaim`.
    """

    @property
    def store(self) -> object: ...

    def record_ending(self, claim: Any, send: OutgoingMessage) -> None:
        """Record, before the retry is published, that the run has ended."""

    def completion_command(self, claim: Any) -> tuple[Any, ...]:
        """Return the command that completes the key, for a store with a `CommandBatcher`."""

    def completion(self, claim: Any) -> tuple[bytes, int] | tuple[bytes, int, bytes, int]:
        """Return value and ttl of the register of the completed key; then of its companion, if it has one."""

    def finish(self, claim: Any, decision: Decision) -> None:
        """Record the end of the run: after the follow-up messages are published, before the message is acked."""

    def drop(self, claim: Any) -> None:
        """Stop holding a claim and write nothing."""


class TimeLimits(StuckListener, Protocol):
    """The part of Timeout that other packages use."""

    @property
    def on_stuck(self) -> object: ...

    def resolve(self, options: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Return an actor's timeout and queue timeout in milliseconds, None for none."""

    def still_stuck(self) -> list[Job]:
        """Return the reported jobs that still run."""


class TransactionalActors(Protocol):
    """Runs the jobs of some actors in transactions: `TransactionalJobs`."""

    def add(self, where: str, actor: Actor[..., Any], options: IdempotencyOptions | None) -> None:
        """Run the jobs of an actor with ``transactional=True`` in transactions.

        Raises:
          ConfigurationError: The actor has no key, or the keys are not in the outbox's database.
        """


class ShutdownDefault(Protocol):
    """The part of ShutdownNotifications that other packages use."""

    notify_shutdown: bool


class OutboxCount(Protocol):
    """How many messages wait in the outbox, and the age of the oldest one in milliseconds: `OutboxStats`."""

    @property
    def pending(self) -> int: ...

    @property
    def oldest_ms(self) -> int: ...


class DeliverySettings(NamedTuple):
    """Settings of the ErrorClassifier that hold for every message.

    Parameters:
      max_body_bytes: The size of the largest body to decode; None for no limit.
      alert_interval: Milliseconds. Alerts and stacks of one actor and error class are logged at most once per interval.
      after_discard: Called when a message has failed permanently; None for no call.
    """

    max_body_bytes: int | None = MAX_BODY_BYTES
    alert_interval: int = 0
    after_discard: Callable[[Any, BaseException], object] | None = None


@dataclass(slots=True)
class IdempotencyState:
    """The part of Idempotency that other packages use.

    Attributes:
      defaults: The ttl and max_crashes of the middleware; None without Idempotency, or without a store.
      postpone: Returns how many milliseconds a due message must stay in the delay queue, or None to move the message now.
      batched_completions: Batches completions; None if batching would be visible from outside.
      booting_until: Before this time (monotonic seconds) no redelivered job begins, since the job may have killed its worker.
        Dramatiq's command waits forever if a worker process dies during the report of its boot.
      keeper: Writes the claims of deliveries; None without Idempotency, or without a store.
    """

    defaults: tuple[int, int | None] | None = None
    postpone: Callable[[MessageProxy], int | None] | None = None
    batched_completions: CompletionBatcher | None = None
    booting_until: float = 0.0
    keeper: ClaimKeeper | None = None

    @property
    def claims(self) -> ClaimKeeper:
        """Writes the claims of deliveries. There if a delivery has a claim."""
        assert self.keeper is not None
        return self.keeper


class BrokerState:
    """The state of dramatiq_policies on a broker, in this process. Each attribute has one writer, in brackets.

    Attributes:
      policies: The resolved options of each actor, by name (`middleware.ordering`).
      outcomes: The observers of outcomes; middleware register in `attach`.
      run_around_job: Runs a job with all callables around the job (`add_around_job`).
      settings: The settings for every message (`ErrorClassifier`).
      stopping: Set as soon as the worker begins to shut down (`ErrorClassifier`).
      timeout: The Timeout middleware; None without one (`Timeout`).
      idempotency: The part of Idempotency for other packages (`Idempotency`).
      transactional_jobs: Runs jobs in transactions; None without an outbox in a database (`Outbox`).
      shutdown_notifications: Our subclass of Dramatiq's ShutdownNotifications (`middleware.ordering`).
      failure_level: The level of the log of dead messages, in place of the worker's line; None for no log (`DiscardLogger`).
      in_command: Whether this process belongs to Dramatiq's command (`PolicyMiddleware`).
      last_received: On RabbitMQ, the last message from each queue. None unless `QueueMonitor` reads the messages (transport).
      last_polled_at: When each consumer last asked the broker, in monotonic seconds. None unless `Heartbeat` reads the times
        (`PolicyConsumer`).
      queues: The state that the transports of each queue share (`queue`).
      read_outbox: Counts the messages of the outbox; None without an outbox (`Outbox`).
      moving_delayed: Per thread, whether a due message is being moved out of the delay queue (`moving_delayed`).
      requeue_after_shutdown: The calls that requeue messages after the worker has shut down, and not before (StubBroker).
      fatal: The error because of which this process must end; None if all is well (`RedisCalls`).
    """

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.policies: dict[str, ActorPolicy] = {}
        self.outcomes = OutcomePublisher()
        self.run_around_job: Proceed = run_job
        self._around_jobs: list[tuple[int, AroundJob]] = []
        self.settings = DeliverySettings()
        self.timeout: TimeLimits | None = None
        self.idempotency = IdempotencyState()
        self.transactional_jobs: TransactionalActors | None = None
        self.shutdown_notifications: ShutdownDefault | None = None
        self.failure_level: int | None = None
        self.last_received: dict[str, Message[Any]] | None = None
        self.last_polled_at: dict[str, float] | None = None
        self.read_outbox: Callable[[], OutboxCount] | None = None
        self._shared: dict[object, object] = {}
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start empty: in a new process no worker runs, and no message was received."""
        self.stopping = threading.Event()
        self.queues: dict[str, QueueState] = {}
        self.moving_delayed = threading.local()
        self.requeue_after_shutdown: list[Callable[[], object]] = []
        self.fatal: str | None = None
        self.in_command = False
        self.idempotency.booting_until = 0.0
        for seen in (self.last_received, self.last_polled_at):
            if seen is not None:
                seen.clear()

    def queue(self, name: str) -> QueueState:
        """Return the state of a queue, or of a delay queue. The first call makes the state."""
        return self.queues.get(name) or self.queues.setdefault(name, QueueState(name))

    def add_around_job(self, around: AroundJob, *, order: int) -> None:
        """Run a callable around every job of this broker. A second call with the same callable changes nothing.

        The chain is built here, once: per message, no closure is created.

        Parameters:
          order: Lower numbers run outside of higher numbers.
        """
        if any(known == around for _, known in self._around_jobs):
            return
        self._around_jobs = sorted([*self._around_jobs, (order, around)], key=lambda entry: entry[0])
        chain: Proceed = run_job
        for _, inner in reversed(self._around_jobs):
            chain = _around(inner, chain)
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


def _around(around: AroundJob, proceed: Proceed) -> Proceed:
    # A partial with a keyword costs several times as much per call.
    return lambda delivery: around(delivery, proceed)


_ATTRIBUTE = "dramatiq_policies_state"
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
