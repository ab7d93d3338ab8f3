"""Outages of the broker and of the idempotency store for tests, as context managers; you can nest them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from dramatiq import Message
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionFailed

from ..delivery.broker_state import state_of
from ..idempotency.options import without_store
from ..middleware.base import has_policies
from ..middleware.idempotency import Idempotency
from ..middleware.ordering import order_middleware
from ..transactions.outbox import outbox_on
from .outboxes import refusing
from .patching import Times
from .stub_environment import environment_of, find_environment

if TYPE_CHECKING:
    from ..stores import IdempotencyStore

__all__ = ["enqueue_down", "store_down"]


@contextmanager
def enqueue_down(
    broker: Broker, exception: type[BaseException] | BaseException = ConnectionFailed, times: int | None = None
) -> Iterator[None]:
    """Let a broker refuse all messages, from your code and from the worker::

        send_confirmation.send(42, "ada@example.com")
        with enqueue_down(broker, times=2), fail(send_confirmation, EmailTimeout):
            # The worker publishes the retry at the third try.
            drain(broker).assert_outcomes(send_confirmation, "retried", "succeeded")

    A message that your code sends in a transaction with an outbox is accepted. `drain` publishes the message, as a relay does, once
    the broker accepts messages again, and tries for ten virtual minutes.

    Parameters:
      exception: The exception to raise, an instance or a class. Default: Dramatiq's ``ConnectionFailed``.
      times: The number of refused messages. Default None: all.

    Raises:
      ConfigurationError: ``times`` is no int of at least 0.

    The worker publishes follow-up messages again and again until it stops. In `drain` it stops after ten virtual minutes, and
    the job's message is back on its queue.
    """
    counted = Times("enqueue_down()", times)
    # First, because a new environment wraps `broker.enqueue` too, and its wrapper stays.
    environment = find_environment(broker)
    outbox = outbox_on(state_of(broker))
    own = vars(broker).get("enqueue")
    accept = broker.enqueue

    def refusal() -> BaseException | None:
        if not counted.take():
            return None
        return exception("enqueue_down()") if isinstance(exception, type) else exception

    def enqueue(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        if (outbox is None or outbox.scope_of(message) is None) and (error := refusal()) is not None:
            raise error
        return accept(message, delay=delay)

    broker.enqueue = enqueue  # type: ignore[method-assign]
    try:
        with ExitStack() as stack:
            if outbox is not None:
                unpublished = [] if environment is None else environment.unpublished
                stack.enter_context(refusing(outbox, refusal, unpublished))
            yield
    finally:
        if own is None:
            del vars(broker)["enqueue"]
        else:
            broker.enqueue = own  # type: ignore[method-assign]


@contextmanager
def store_down(
    broker: Broker, exception: type[BaseException] | BaseException = ConnectionError, times: int | None = None
) -> Iterator[None]:
    """Let all calls of a broker's idempotency store fail::

        charge.send(42)
        with store_down(broker):
            drain(broker, until=timedelta(minutes=1))
        assert gateway.charges == []  # The message waits for the store.
        drain(broker).assert_outcomes(charge, "succeeded")

    Parameters:
      exception: The exception to raise, an instance or a class. Default: the built-in ``ConnectionError``.
      times: The number of failing calls. Default None: all. Without ``until=``, `drain` then ends as soon as all remaining
        messages wait for the store; they stay queued.

    Raises:
      ConfigurationError: The broker has no Idempotency with a store.
    """
    if has_policies(broker):
        order_middleware(broker)
    found = [one for one in broker.middleware if isinstance(one, Idempotency) and one.claims is not None]
    if not found:
        raise without_store("store_down()")
    claims, counted = found[0].claims, Times("store_down()", times)
    assert claims is not None
    store = claims.store
    claims.store = cast("IdempotencyStore", _UnreachableStore(store, exception, counted))
    environment = environment_of(broker) if isinstance(broker, StubBroker) else None
    if environment is not None:
        before, environment.store_is_down = environment.store_is_down, times is None
    try:
        yield
    finally:
        claims.store = store
        if environment is not None:
            environment.store_is_down = before


class _UnreachableStore:
    """An unreachable store."""

    def __init__(self, store: object, exception: type[BaseException] | BaseException, counted: Times) -> None:
        self._store, self._exception, self._counted = store, exception, counted

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._counted.take():
                raise self._exception("store_down()") if isinstance(self._exception, type) else self._exception
            return method(*args, **kwargs)

        return call
