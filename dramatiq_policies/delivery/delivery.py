"""The state of one message, from the consumer to the acknowledgement.

The consumer makes a `Delivery` for each message from a work queue. The hooks and the wrapper of ``actor.fn`` only fill in
the attributes; `settlement` acts on them. Only one thread at a time uses a delivery (first the consumer's, then a
worker's), so a delivery needs no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeAlias, cast

from dramatiq import Message
from dramatiq.middleware import SkipMessage

from ..common import clock
from ..common.current import current as _current
from .decision import COMPLETING, SUCCEEDED, Decision

if TYPE_CHECKING:
    from dramatiq.broker import MessageProxy

    from ..interrupts import Runner
    from ..interrupts.slots import StuckListener
    from .actor_policy import ActorPolicy
    from .outgoing import FollowUp, OutgoingMessage

__all__ = [
    "DeliveringTransport",
    "Delivery",
    "DeliveryReassigned",
    "EarlierRun",
    "Job",
    "JobTransaction",
    "KeyClaim",
    "RunContext",
    "running_delivery",
]

#: The delivery in work on this thread, greenlet or task.
current = cast("ContextVar[Delivery | None]", _current)


class RunContext(Protocol):
    """The part of `BrokerState` that a run of a job uses."""

    @property
    def policies(self) -> Mapping[str, ActorPolicy]: ...

    @property
    def run_around_job(self) -> Callable[[Delivery], Any]: ...

    @property
    def timeout(self) -> StuckListener | None: ...

    @property
    def failure_level(self) -> int | None: ...

    def interrupted_by_shutdown(self, delivery: Delivery) -> bool: ...


class DeliveringTransport(Protocol):
    """The part of `Transport` for the run of a job and the reports of the run."""

    source: str
    queue_name: str
    acks_with_follow_ups: bool

    @property
    def state(self) -> RunContext: ...

    def after_interrupt(self) -> None:
        """Drop connections of this thread that an interrupt of a job may have left in an unknown state."""

    def completion_command(self, delivery: Delivery) -> tuple[tuple[Any, ...], bool]:
        """Return the command to complete the key of a plain success, and whether the command also acknowledges."""

    def acked_by_completion(self, delivery: Delivery, reply: object) -> None:
        """The command of `completion_command` has acknowledged the message."""

    def ack(self, message: MessageProxy) -> None:
        """Acknowledge a message."""


class DeliveryReassigned(Exception):
    """The broker has delivered the message to another worker meanwhile; that worker settles the message."""


class EarlierRun(NamedTuple):
    """The rest of an earlier delivery of the same message.

    Attributes:
      decision: The decision of that delivery.
      follow_ups: The follow-up messages of that delivery, without the messages already published.
    """

    decision: Decision
    follow_ups: list[FollowUp] | None


class KeyClaim(Protocol):
    """The part of a `Claim` on an idempotency key that this package reads."""

    @property
    def keyed(self) -> bool:
        """Whether the store remembers the completion; otherwise the claim only counts starts."""


@dataclass(slots=True)
class JobTransaction:
    """The database transaction of a job with ``transactional=True``.

    Attributes:
      session: The session for the job; None with Django.
      is_committed: Whether the effects of the job, the completion of its key and its follow-up messages are committed.
    """

    session: Any
    is_committed: bool = False


#: A job to run: the runner, which also interrupts; the function; its positional and its keyword arguments.
Job: TypeAlias = "tuple[Runner, Callable[..., Any], tuple[Any, ...], dict[str, Any]]"

#: The stages of a delivery: taken from the queue; before-hooks done; job running; job finished.
RECEIVED, PREPARED, RUNNING, FINISHED = range(4)


class Delivery:
    """One message taken from a work queue.

    Attributes:
      transport: The transport that delivered the message; no other may acknowledge the message.
      message: The message itself. Not Dramatiq's proxy, which refers to the delivery: a reference cycle for each message
        would keep the garbage collector busy.
      body: The encoded message as received; None if the broker does not show the body. Retries and dead letters take
        their arguments from here, since the job may change its arguments in place.
      proxy: Dramatiq's proxy of the message, from the before-hooks to the after-hooks; None otherwise.
      policy: The actor's resolved options; None until the before-hooks ran.
      stage: RECEIVED, PREPARED, RUNNING or FINISHED.
      started, ended: When the call of the actor began and ended, in monotonic seconds; None before.
      timeout_ms: The timeout of this run in milliseconds; None without a timeout.
      decision: How the delivery ends; None until the decision is made.
      follow_ups: The messages to publish before the acknowledgement, in order; also calls that return such messages. Each
        message accepted by the broker is removed. None if there is nothing to publish.
      settled: Everything but the acknowledgement is done and must not be done again.
      acked: The publish of the follow-up messages has also acknowledged the message.
      redelivered: Another worker may have begun the message before, and not finished.
      earlier_run: The rest of an earlier run that has ended in this process. If set, the delivery is settled by that and the
        job does not run.
      claim: The claim on the idempotency key; None without a key.
      job: The function to run, with the arguments. Set by the wrapper of the actor's function.
      key: The idempotency key, as the user knows the key; None without a key.
      transaction: The transaction of a job with ``transactional=True``; None otherwise.
      abandoned: The message is neither acknowledged nor rejected: the broker redelivers the message.
    """

    __slots__ = (
        "abandoned",
        "acked",
        "body",
        "claim",
        "decision",
        "earlier_run",
        "ended",
        "follow_ups",
        "job",
        "key",
        "message",
        "policy",
        "proxy",
        "redelivered",
        "settled",
        "stage",
        "started",
        "timeout_ms",
        "transaction",
        "transport",
    )

    def __init__(self, transport: DeliveringTransport, message: Message[Any]) -> None:
        self.transport = transport
        self.message = message
        self.body: bytes | None = None
        self.proxy: MessageProxy | None = None
        self.policy: ActorPolicy | None = None
        self.stage = RECEIVED
        self.started: float | None = None
        self.ended: float | None = None
        self.timeout_ms: float | None = None
        self.decision: Decision | None = None
        self.follow_ups: list[FollowUp] | None = None
        self.settled = False
        self.acked = False
        self.redelivered = False
        self.earlier_run: EarlierRun | None = None
        self.claim: KeyClaim | None = None
        self.job: Job
        self.key: str | None = None
        self.transaction: JobTransaction | None = None
        self.abandoned = False

    def add_follow_up(self, follow_up: FollowUp) -> None:
        """Publish a message, or the messages that a call returns, before this delivery is acknowledged."""
        if self.follow_ups is None:
            self.follow_ups = []
        self.follow_ups.append(follow_up)

    @property
    def outgoing(self) -> list[OutgoingMessage]:
        """The follow-up messages, once the calls among them are replaced by their messages (`FollowUpPublisher`)."""
        return cast("list[OutgoingMessage]", self.follow_ups or [])

    def skip(self, decision: Decision, why: str = "") -> NoReturn:
        """Decide not to run the job now. Called inside the wrapper of the actor's function.

        Dramatiq's ``Results`` would store None for a skipped message that has not failed, and a waiting caller would get
        that None. So this turns off ``store_results``, or fails the message.

        Raises:
          SkipMessage: Always.
        """
        self.decision = decision
        if not decision.dead_letter:
            self.message.options["store_results"] = False
        elif self.proxy is not None:
            self.proxy.fail()
        raise SkipMessage(why or f"{decision.outcome.value} ({decision.reason})")

    def received_message(self) -> Message[Any] | None:
        """Decode the message as received; None without a body, or if decoding fails on this thread."""
        if self.body is None:
            return None
        try:
            return Message.decode(self.body)
        except Exception:  # Such as RecursionError: the stack is deeper here than in the consumer.
            return None

    def next_message(self, **options: Any) -> Message[Any]:
        """Copy the message for the next run: the arguments as received, the current options, and the given options."""
        sent = self.received_message() or self.message
        return self.message.copy(args=sent.args, kwargs=sent.kwargs, options=options)

    def restore_arguments(self, proxy: MessageProxy) -> None:
        """Reset the arguments of the message and of the worker's proxy to the arguments as received."""
        sent = self.received_message()
        if sent is not None:
            for name in ("args", "kwargs"):
                value = getattr(sent, name)
                object.__setattr__(self.message, name, value)  # A message is frozen.
                vars(proxy)[name] = value

    def is_plain_success(self) -> bool:
        """Whether only the acknowledgement is left to do."""
        return self.decision is SUCCEEDED and self.follow_ups is None

    def completes_key(self) -> bool:
        """Whether the key will be completed: a redelivery is skipped, so this delivery must publish its follow-up messages."""
        claim, decision = self.claim, self.decision
        return claim is not None and claim.keyed and decision is not None and decision.outcome in COMPLETING

    @property
    def is_committed(self) -> bool:
        """Whether a transaction has committed the job with its follow-up messages: nothing is left to publish."""
        return self.transaction is not None and self.transaction.is_committed

    @property
    def is_running(self) -> bool:
        """Whether the job is running now."""
        return self.stage == RUNNING

    def elapsed_ms(self) -> float:
        """How long the actor has run, or ran, in milliseconds."""
        if self.started is None:
            return 0.0
        return ((monotonic() if self.ended is None else self.ended) - self.started) * 1_000

    def waited_ms(self) -> float | None:
        """From ready to started, in milliseconds; None if the message has no ``ready_at``, or no run has started."""
        ready: float | None = self.message.options.get(READY_AT)
        if ready is None or self.started is None:
            return None
        return max(0.0, (clock.time() - (monotonic() - self.started)) * 1_000 - ready)


#: The message option with the time at which the message became, or becomes, ready: milliseconds since the epoch.
READY_AT = "ready_at"


def running_delivery() -> Delivery | None:
    """Return the delivery of the job running in this thread, greenlet or task; None outside a job."""
    delivery = current.get()
    return delivery if delivery is not None and delivery.stage == RUNNING else None
