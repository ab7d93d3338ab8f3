"""Failures of jobs and of workers for tests, as context managers; you can nest them. `outages` has those of servers."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import TYPE_CHECKING, Any

from dramatiq import Message, get_broker
from dramatiq.broker import Broker
from dramatiq.brokers.stub import StubBroker

from ..delivery.delivery import Delivery, running_delivery
from ..errors import ConfigurationError, TimeoutExceeded
from ..middleware.base import has_policies
from ..middleware.ordering import order_middleware
from .draining import WorkerDied, drain_in_progress
from .patching import Times, around, expect_actor, in_place_of
from .virtual_time import clock_in_force

if TYPE_CHECKING:
    from dramatiq import Actor


__all__ = ["crash", "die_in_job", "fail", "hang", "redeliver"]


def fail(
    actor: Actor[..., Any], exception: type[BaseException] | BaseException, times: int | None = 1
) -> AbstractContextManager[None]:
    """Raise an exception in place of an actor's job::

        with fail(send_confirmation, EmailTimeout, times=2):
            send_confirmation.send(42, "ada@example.com")
            drain(broker).assert_outcomes(send_confirmation, "retried", "retried", "succeeded")

    Parameters:
      exception: An instance, or a class without required arguments.
      times: The number of failing runs; None for all. Default 1.

    Raises:
      ConfigurationError: ``exception`` is no exception, or its class needs arguments.
    """
    expect_actor("fail()", actor)
    where = f"fail({actor.actor_name!r})"
    counted = Times(where, times)
    if isinstance(exception, type) and issubclass(exception, BaseException):
        try:
            exception()
        except TypeError as error:
            raise ConfigurationError.of_option(
                where,
                "exception",
                "a class that takes no arguments",
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
    """Let an actor's job hang until its timeout interrupts the job::

        with hang(send_confirmation, times=1):
            send_confirmation.send(42, "ada@example.com")
            drain(broker).assert_outcomes(send_confirmation, "retried", "succeeded")

    In `drain` the virtual clock skips the timeout. Under a real worker the job hangs in real time.

    Parameters:
      times: The number of hanging runs. Default None: all.

    Raises:
      ConfigurationError: The actor has no timeout.
    """
    expect_actor("hang()", actor)
    where = f"hang({actor.actor_name!r})"
    counted = Times(where, times)
    if not has_policies(actor.broker):
        raise ConfigurationError(f"{where}: the actor's broker has no Timeout. Call install(broker) first.")
    policy = order_middleware(actor.broker).policies.get(actor.actor_name)
    if policy is None or policy.timeout_ms is None:
        raise ConfigurationError(f"{where}: the actor has no timeout and would hang forever. Declare a timeout.")

    def before(in_loop: bool) -> Any:
        if not counted.take():
            return None
        delivery = running_delivery()
        if delivery is None:
            raise RuntimeError(f"{where}: the actor was called directly, and would hang forever.")
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
        raise RuntimeError("hang(): this message has no timeout and would hang forever.")
    clock.advance(ceil(limit))
    # The job measures real time: move its start back.
    delivery.started -= ceil(limit) / 1_000
    raise TimeoutExceeded


def crash(actor: Actor[..., Any], times: int | None = 1, *, after_effect: bool = False) -> AbstractContextManager[None]:
    """Let the worker die in an actor's job: no hook runs, and the broker delivers the message again::

        with crash(charge, after_effect=True):
            charge.send(42)
            drain(broker)
        assert len(gateway.charges) == 1  # the second run used the same key

    Works in `drain` and `perform`; a new worker replaces the dead worker at once.

    Parameters:
      times: The number of crashes; None for all runs. Default 1.
      after_effect: Whether the worker dies after the job's last line. Default False: before the first.
    """
    expect_actor("crash()", actor)
    where = f"crash({actor.actor_name!r})"
    counted = Times(where, times)

    def die() -> None:
        if counted.take():
            die_in_job(where)

    if after_effect:
        return in_place_of(actor, lambda fn: around(fn, lambda _: None, die))
    return in_place_of(actor, lambda fn: around(fn, lambda _: die()))


def die_in_job(where: str) -> None:
    """Let the worker die at this point.

    Raises:
      WorkerDied: Always, to end the job.
      RuntimeError: No drain is in progress.
    """
    work = drain_in_progress()
    if work is None:
        raise RuntimeError(f"{where}: only drain() and perform() have a worker that can die.")
    work.died = True
    raise WorkerDied


def redeliver(message: Message[Any], broker: Broker | None = None) -> AbstractContextManager[None]:
    """Deliver a message again, with the same id, arguments and options, as a broker may do::

        message = charge.send(42)
        drain(broker).assert_outcomes(charge, "succeeded")
        redeliver(message)
        drain(broker).assert_outcomes(charge, "duplicate")

    The call takes effect at once; ``with redeliver(message):`` works too. A message that is still queued is queued twice.

    Parameters:
      broker: The StubBroker of the message. Default None: the global broker.

    Raises:
      ConfigurationError: The broker is no StubBroker, or lacks the message's queue.
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
