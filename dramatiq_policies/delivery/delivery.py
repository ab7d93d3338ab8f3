"""One message on its way from the consumer to its ack, and the job that sees it.

A `Delivery` is made by the wrapping consumer for each message that it takes from a work queue. Hooks and the wrapper of
``actor.fn`` only fill it in; `settlement` acts on it. It belongs to one thread at a time (consumer, then worker), so
nothing in it is locked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from dramatiq import Message
from dramatiq.middleware import SkipMessage

from ..common import clock
from ..common.current import current as _current
from .decision import COMPLETING, SUCCEEDED, Decision

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy

    from ..interrupts import Runner
    from .actor_policy import ActorPolicy

__all__ = [
    "Carried",
    "Delivery",
    "DeliveryReassigned",
    "Job",
    "OutgoingMessage",
    "Recorder",
    "running_delivery",
]

#: The delivery that this thread (greenlet, task) works on.
current = cast("ContextVar[Delivery | None]", _current)


class OutgoingMessage:
    """A message that must be accepted by the broker before its cause is acked."""

    __slots__ = ("delay", "encoded", "message")

    def __init__(self, message: Message[Any], delay: int | None = None) -> None:
        self.message = message
        self.delay = delay
        #: What the broker is sent, made once: a repeated hand-off sends the very same.
        self.encoded: Any = None


class DeliveryReassigned(Exception):
    """The broker has given the message to another worker meanwhile, who is to settle it."""


class Recorder:
    """Stands in for the broker where Dramatiq's own code enqueues in an after-hook, and records the messages."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.sends: list[OutgoingMessage] = []

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        self.sends.append(OutgoingMessage(message, delay))
        return message

    def __getattr__(self, name: str) -> Any:
        return getattr(self.broker, name)


class Carried(NamedTuple):
    """What an earlier delivery of the same message has left to do: the decision, and what was not handed on yet."""

    decision: Decision
    steps: list[OutgoingMessage | Callable[[], list[OutgoingMessage]]] | None


class Job(NamedTuple):
    """The function that a delivery runs, with its arguments.

    Attributes:
      call: Calls the function and interrupts it at its deadline.
    """

    call: Runner
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


#: Where a delivery is on its way: taken from the queue, before-hooks done, in the job, the job is over.
RECEIVED, PREPARED, RUNNING, FINISHED = range(4)


class Delivery:
    """One message taken from a work queue.

    Attributes:
      transport: The transport that delivered it; no other may acknowledge it.
      message: The message; not Dramatiq's proxy of it, which refers to the delivery: a cycle for each message would keep
        the garbage collector busy.
      body: The message as received, encoded. Retries and dead letters take their arguments from here, since the job
        may change its own in place. None where the broker does not show it.
      proxy: Dramatiq's proxy of the message, from the before-hooks to the after-hooks; None otherwise.
      policy: The actor's resolved options; None until the before-hooks ran.
      stage: TAKEN, READY, RUNNING or RAN.
      started, ended: Monotonic seconds at which the actor was called and was over; None before.
      timeout_ms: The execution timeout in force, None for none.
      settlement: What was decided, None until then.
      steps: What must be handed on before the ack, in order: messages, and calls that yield some. Emptied as the
        broker accepts.
      settled: Everything but the ack is done and must not be done again.
      acked: The hand-off took the message off its queue in the same step.
      redelivered: It may have been begun before, by a worker that did not end it.
      carried: What is left of an earlier run that has ended in this process: it is settled so, and does not run.
      claim: The claim on its idempotency key, None without one.
      job: The function to run, with its arguments. Set by the wrapper of the actor's function.
      key: The key, as the user knows it; None without one.
      abandoned: The message is neither acked nor nacked: it comes back.
    """

    __slots__ = (
        "abandoned",
        "acked",
        "body",
        "carried",
        "claim",
        "decision",
        "ended",
        "job",
        "key",
        "message",
        "outbox",
        "policy",
        "proxy",
        "redelivered",
        "settled",
        "stage",
        "started",
        "timeout_ms",
        "transport",
    )

    def __init__(self, transport: Any, message: Message[Any]) -> None:
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
        self.outbox: list[OutgoingMessage | Callable[[], list[OutgoingMessage]]] | None = None
        self.settled = False
        self.acked = False
        self.redelivered = False
        self.carried: Carried | None = None
        self.claim: Any = None
        self.job: Job
        self.key: str | None = None
        self.abandoned = False

    def add_to_outbox(self, step: OutgoingMessage | Callable[[], list[OutgoingMessage]]) -> None:
        """Have a message, or those that a call yields, accepted by the broker before this delivery is acked."""
        if self.outbox is None:
            self.outbox = []
        self.outbox.append(step)

    def skip(self, decision: Decision, why: str = "") -> NoReturn:
        """Decide that the job is not run now, from inside the wrapper of its function.

        Dramatiq's ``Results`` stores None for what is skipped and not failed: whoever waits would see that first.

        Raises:
          SkipMessage: Always.
        """
        self.decision = decision
        if not decision.dead_letter:
            self.message.options["store_results"] = False
        elif self.proxy is not None:
            self.proxy.fail()
        raise SkipMessage(why or f"{decision.outcome.value} ({decision.reason})")

    def received(self) -> Message[Any] | None:
        """Decode the message as received; None if there is no body, or this thread cannot decode it."""
        if self.body is None:
            return None
        try:
            return Message.decode(self.body)
        except Exception:  # A RecursionError: the stack is deeper here than in the consumer.
            return None

    def again(self, **options: Any) -> Message[Any]:
        """Copy the message for its next run: arguments as received, options as they are now and with these."""
        sent = self.received() or self.message
        return self.message.copy(args=sent.args, kwargs=sent.kwargs, options=options)

    def restore(self, proxy: MessageProxy) -> None:
        """Give the message, and the worker's proxy of it, the arguments as received."""
        sent = self.received()
        if sent is not None:
            for name in ("args", "kwargs"):
                value = getattr(sent, name)
                object.__setattr__(self.message, name, value)  # A message is frozen.
                vars(proxy)[name] = value

    def is_plain_success(self) -> bool:
        """Whether nothing follows from it but its ack."""
        return self.decision is SUCCEEDED and self.outbox is None

    def completes_key(self) -> bool:
        """Whether its completion is remembered: then a redelivery hands nothing on, so all that follows must be, here."""
        claim, decision = self.claim, self.decision
        return claim is not None and claim.keyed and decision is not None and decision.outcome in COMPLETING

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
        """From ready to started, in milliseconds; None where no clock says when it became ready."""
        ready: float | None = self.message.options.get(READY_AT)
        if ready is None or self.started is None:
            return None
        return max(0.0, (clock.time() - (monotonic() - self.started)) * 1_000 - ready)


#: The message option that says when it became, or becomes, ready: ms since the epoch.
READY_AT = "ready_at"


def running_delivery() -> Delivery | None:
    """The delivery whose job is running in this thread, greenlet or task; None outside a job."""
    delivery = current.get()
    return delivery if delivery is not None and delivery.stage == RUNNING else None
