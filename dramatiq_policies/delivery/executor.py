"""The wrapper of ``actor.fn``, between Dramatiq's before-hooks and after-hooks.

The wrapper runs an actor's message through each registered `AroundJob` (`Timeout` and `Idempotency` register one each; see
`BrokerState.add_around_job`) and then runs the job. A direct call, or a call from another actor, goes straight to the
function. Because the wrapper runs after every before-hook and before any after-hook, the order of middleware doesn't matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from .._job_errors import stand_in_for
from ..common.callables import mark_wrapper, unwrapped
from ..interrupts import runner_for
from .delivery import FINISHED, PREPARED, RUNNING, Delivery, current

if TYPE_CHECKING:
    from dramatiq import Actor

    from .delivery import Job


__all__ = ["AroundJob", "Proceed", "run_job", "wrap_actor"]

#: Runs the next `AroundJob`, or the job. Returns the job's result.
Proceed = Callable[[Delivery], Any]


class AroundJob(Protocol):
    """Runs around every job of a broker."""

    def __call__(self, delivery: Delivery, proceed: Proceed) -> Any:
        """Return ``proceed(delivery)``, or call `Delivery.skip` if the job must not run now."""


def wrap_actor(actor: Actor[..., Any]) -> None:
    """Replace ``actor.fn``, once.

    Two actors may share a function: each gets a separate wrapper. The wrapper acts for the delivering broker: one wrapper
    serves actors of the same name on several brokers.
    """
    name = actor.actor_name
    given: Any = actor.fn
    fn = unwrapped(given)
    if fn is not given and given.dramatiq_policies_wraps.actor_name == name:
        return
    runner = runner_for(fn)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        delivery = current.get()
        if delivery is None or delivery.stage != PREPARED or delivery.message.actor_name != name:
            return fn(*args, **kwargs)
        try:
            if delivery.earlier_run is not None:
                _settle_earlier_run(delivery)
            delivery.job = (runner, fn, args, kwargs)
            return delivery.transport.state.run_around_job(delivery)
        except BaseException as error:
            stand_in = stand_in_for(error)
            if stand_in is None:
                raise
        # Outside of the handler: otherwise the error would become the context of the stand-in.
        raise stand_in

    mark_wrapper(run, fn, name)
    actor.fn = run


def _settle_earlier_run(delivery: Delivery) -> None:
    """Settle the rest of an earlier run in this process, without a run."""
    assert delivery.earlier_run is not None
    decision, delivery.follow_ups = delivery.earlier_run
    delivery.skip(decision)


def run_job(delivery: Delivery, job: Job | None = None) -> Any:
    """Run the job of a delivery: interruptible, with the delivery's clock running.

    Parameters:
      job: A function to run in the place of the delivery's own.
    """
    runner, fn, args, kwargs = delivery.job if job is None else job
    limit, state = delivery.timeout_ms, delivery.transport.state
    delivery.stage = RUNNING
    delivery.started = started = monotonic()
    delivery.ended = None
    try:
        return runner(
            fn,
            args,
            kwargs,
            deadline=None if limit is None else started + limit / 1_000,
            on_shutdown=state.interrupted_by_shutdown(delivery),
            stuck_listener=state.timeout,
            job=delivery,
            after_interrupt=delivery.transport.after_interrupt,
        )
    finally:
        delivery.ended = monotonic()
        delivery.stage = FINISHED
