"""What goes wrong in production, made to go wrong in a test: context managers, which may be nested."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from dramatiq import Message, get_broker
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionFailed

from ..delivery.delivery import Delivery, running_delivery
from ..errors import ConfigurationError, TimeoutExceeded
from ..middleware.base import PolicyMiddleware
from ..middleware.idempotency import Idempotency
from ..middleware.ordering import order_middleware
from .draining import WorkerDied, drain_in_progress
from .patching import around, in_place_of
from .stub_environment import environment_of
from .virtual_time import clock_in_force

if TYPE_CHECKING:
    from dramatiq import Actor

    from ..stores import IdempotencyStore

__all__ = ["crash", "enqueue_down", "fail", "hang", "redeliver", "store_down"]


class _Times:
    """How often something still happens; None for always."""

    def __init__(self, where: str, times: int | None) -> None:
        if times is not None and (type(times) is not int or times < 0):
            raise ConfigurationError.of_option(where, "times", "an int of at least 0, or None for always", times)
        self.left = times
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self.left is None:
                return True
            self.left -= 1
            return self.left >= 0


def fail(
    actor: Actor[..., Any], exception: type[BaseException] | BaseException, times: int | None = 1
) -> AbstractContextManager[None]:
    """Have an actor raise instead of doing its work.

    Parameters:
      exception: An instance, or a class that can be made without arguments.
      times: For how many runs; None for all. Default 1.

    Raises:
      ConfigurationError: ``exception`` is neither.
    """
    where = f"fail({actor.actor_name!r})"
    counted = _Times(where, times)
    if isinstance(exception, type) and issubclass(exception, BaseException):
        try:
            exception()
        except TypeError as error:
            raise ConfigurationError.of_option(
                where,
                "exception",
                "a class that can be made without arguments",
                exception,
                f"Pass an instance ({error})",
            ) from None
    elif not isinstance(exception, BaseException):
        raise ConfigurationError.of_option(where, "exception", "an exception, or a class of one", exception)

    def before(_: bool) -> None:
        if counted.take():
            raise exception() if isinstance(exception, type) else exception.with_traceback(None)

    return in_place_of(actor, lambda fn: around(fn, before))


def hang(actor: Actor[..., Any], times: int | None = None) -> AbstractContextManager[None]:
    """Have an actor hang instead of doing its work, until its timeout ends it.

    In `drain` that is at once, and on the virtual clock after as long as the timeout; under a real worker, it hangs.

    Parameters:
      times: For how many runs; None, the default, for all.

    Raises:
      ConfigurationError: The actor has no timeout: it would hang for ever.
    """
    where = f"hang({actor.actor_name!r})"
    counted = _Times(where, times)
    if not any(isinstance(middleware, PolicyMiddleware) for middleware in actor.broker.middleware):
        raise ConfigurationError(f"{where}: the actor's broker has no Timeout. Call install(broker) first.")
    policy = order_middleware(actor.broker).policies.get(actor.actor_name)
    if policy is None or policy.timeout_ms is None:
        raise ConfigurationError(f"{where}: the actor has no timeout, so it would hang for ever. Give it one.")

    def before(in_loop: bool) -> Any:
        if not counted.take():
            return None
        delivery = running_delivery()
        if delivery is None:
            raise RuntimeError(f"{where}: it was called directly, and nothing would ever end it.")
        if clock_in_force() is not None:
            _let_time_out(delivery)
        if in_loop:
            return asyncio.sleep(float("inf"))
        while True:
            time.sleep(0.005)

    return in_place_of(actor, lambda fn: around(fn, before))


def _let_time_out(delivery: Delivery) -> None:
    clock, limit = clock_in_force(), delivery.timeout_ms
    assert clock is not None
    if limit is None or delivery.started is None:
        raise RuntimeError("hang(): this message has no timeout, and would hang for ever.")
    clock.advance(ceil(limit))
    # The job's own time is real: it began so much earlier.
    delivery.started -= ceil(limit) / 1_000
    raise TimeoutExceeded


def crash(actor: Actor[..., Any], times: int | None = 1, *, after_effect: bool = False) -> AbstractContextManager[None]:
    """Have the worker die in an actor's job: nothing after it happens, and its message is delivered again.

    Works in `drain` and `perform`, on whose thread the dead worker is replaced at once.

    Parameters:
      times: In how many runs; None for all. Default 1.
      after_effect: False, the default, before the job has done anything; True when it has done all.
    """
    where = f"crash({actor.actor_name!r})"
    counted = _Times(where, times)

    def die() -> None:
        if counted.take():
            die_in_job(where)

    if after_effect:
        return in_place_of(actor, lambda fn: around(fn, lambda _: None, die))
    return in_place_of(actor, lambda fn: around(fn, lambda _: die()))


def die_in_job(where: str) -> None:
    """Let the worker die, here and now.

    Raises:
      WorkerDied: For this job to end.
      RuntimeError: No drain is in progress.
    """
    work = drain_in_progress()
    if work is None:
        raise RuntimeError(f"{where}: only drain() and perform() have a worker that can die and be replaced.")
    work.died = True
    raise WorkerDied


def redeliver(message: Message[Any], broker: Broker | None = None) -> AbstractContextManager[None]:
    """Deliver a message that was sent once more, as brokers do: same id, same everything.

    At once, when it is called; it may stand in a ``with`` as the other faults do. A message that is still queued is then
    queued twice.

    Parameters:
      broker: The StubBroker that it was sent through; None, the default, for the global one.

    Raises:
      ConfigurationError: That is no StubBroker, or has no such queue.
    """
    if broker is None:
        broker = get_broker()
    if not isinstance(broker, StubBroker) or message.queue_name not in broker.queues:
        raise ConfigurationError(
            f"redeliver(): expected a StubBroker with the queue {message.queue_name!r}, got a {type(broker).__name__}. "
            "Use stub(), or pass the broker."
        )
    broker.queues[message.queue_name].put(message.encode())
    return nullcontext()


@contextmanager
def enqueue_down(
    broker: Broker, exception: type[BaseException] | BaseException = ConnectionFailed, times: int | None = None
) -> Iterator[None]:
    """Have a broker accept no messages: neither from whoever sends one, nor what follows from a job.

    Parameters:
      exception: What it raises, an instance or a class. By default Dramatiq's ``ConnectionFailed``.
      times: How many messages it does not accept; None, the default, for all.

    A hand-off is tried again until the worker stops, which in `drain` it does after ten virtual minutes: the message
    is then back on its queue.
    """
    counted = _Times("enqueue_down()", times)
    own = vars(broker).get("enqueue")
    accept = broker.enqueue

    def enqueue(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        if counted.take():
            raise exception("enqueue_down()") if isinstance(exception, type) else exception
        return accept(message, delay=delay)

    broker.enqueue = enqueue  # type: ignore[method-assign]
    try:
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
    """Have a broker's idempotency store answer nothing.

    Parameters:
      exception: What it raises, an instance or a class. By default the built-in ``ConnectionError``.
      times: How many calls fail; None, the default, for all. Then `drain` ends, unless told until when to go on, when
        only messages are left that wait for the store: they stay queued.

    Raises:
      ConfigurationError: The broker has no Idempotency with a store.
    """
    if any(isinstance(middleware, PolicyMiddleware) for middleware in broker.middleware):
        order_middleware(broker)
    found = [one for one in broker.middleware if isinstance(one, Idempotency) and one.claims is not None]
    if not found:
        raise ConfigurationError("store_down(): the broker has no Idempotency with a store.")
    claims, counted = found[0].claims, _Times("store_down()", times)
    assert claims is not None
    store = claims.store
    claims.store = cast("IdempotencyStore", _Down(store, exception, counted))
    environment = environment_of(broker) if isinstance(broker, StubBroker) else None
    if environment is not None:
        before, environment.store_is_down = environment.store_is_down, times is None
    try:
        yield
    finally:
        claims.store = store
        if environment is not None:
            environment.store_is_down = before


class _Down:
    """A store that can't be reached."""

    def __init__(self, store: object, exception: type[BaseException] | BaseException, counted: _Times) -> None:
        self._store, self._exception, self._counted = store, exception, counted

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._counted.take():
                raise self._exception("store_down()") if isinstance(self._exception, type) else self._exception
            return method(*args, **kwargs)

        return call
