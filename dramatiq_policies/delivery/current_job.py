"""``current_job()`` gives a job its message id, attempt, idempotency key and remaining time."""

from __future__ import annotations

from typing import Any, TypeVar, overload

from ..errors import ConfigurationError, NoCurrentJob
from .delivery import Delivery, running_delivery
from .history import attempt_of

__all__ = ["CurrentJob", "current_job"]

T = TypeVar("T")


class CurrentJob:
    """The running job, from `current_job`: message, attempt, idempotency key and remaining time.

    Example::

        def charge(order_id, amount):
            job = current_job()
            payments.charge(amount, idempotency_key=job.idempotency_key, attempt=job.attempt)
    """

    __slots__ = ("_delivery",)

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    @property
    def message_id(self) -> str:
        """The message's id, the same in every attempt."""
        return self._delivery.message.message_id

    @property
    def actor(self) -> str:
        """The actor's name."""
        return self._delivery.message.actor_name

    @property
    def queue(self) -> str:
        """The name of the queue."""
        return self._delivery.message.queue_name

    @property
    def attempt(self) -> int:
        """The number of this run of the message, 1 for the first."""
        return attempt_of(self._delivery.message.options)

    @property
    def idempotency_key(self) -> str:
        """The idempotency key, the same in every attempt. Pass the key on, for example to a payment service.

        If neither the actor nor the message declares a key, the message id is the key.
        """
        delivery = self._delivery
        # A `TypedKey` becomes a plain str, because database drivers check the exact type.
        return delivery.message.message_id if delivery.key is None else str(delivery.key)

    @property
    def session(self) -> Any:
        """The session of a job with ``transactional=True``: a ``Session``, or an ``AsyncSession`` in an async job.

        With Django None: use the ORM. The worker commits after the job has returned. Don't commit it yourself.

        Raises:
          ConfigurationError: The actor is not transactional.
        """
        transaction = self._delivery.transaction
        if transaction is None:
            raise ConfigurationError(f"actor {self.actor!r} has no session: declare the actor with transactional=True.")
        return transaction.session

    def remaining_ms(self) -> float | None:
        """Milliseconds left until the timeout, 0 after the timeout; None without a timeout."""
        delivery = self._delivery
        if delivery.timeout_ms is None:
            return None
        return max(0.0, delivery.timeout_ms - delivery.elapsed_ms())


@overload
def current_job() -> CurrentJob: ...


@overload
def current_job(default: T, /) -> CurrentJob | T: ...


def current_job(*default: Any) -> Any:
    """Return the job that runs in this thread, greenlet or task.

    ::

        current_job().attempt           # in a job
        job = current_job(None)         # in code that also runs outside of a job

    Python copies a context into a task, but not into a thread or greenlet. In a thread that a job starts, run the
    function in the job's context: ``executor.submit(contextvars.copy_context().run, function)``. Or call
    ``current_job()`` in the job and pass the result, which stays valid.

    Parameters:
      default: The value to return outside of a job. Without a default, the call raises outside of a job.

    Raises:
      NoCurrentJob: No job runs here, and no default was given. A ``LookupError``.
    """
    if len(default) > 1:
        raise TypeError(f"current_job() takes at most 1 argument, a default; got {len(default)}")
    delivery = running_delivery()
    if delivery is not None:
        return CurrentJob(delivery)
    if default:
        return default[0]
    raise NoCurrentJob(
        "current_job() was called outside of a job. Call it in the function of an actor that a worker runs; use "
        "current_job(None) in code that also runs elsewhere. In a thread or greenlet that the job started, run the code "
        "in contextvars.copy_context(), or pass the job's current_job() to it."
    )
