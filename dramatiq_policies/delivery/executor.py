"""The wrapper of ``actor.fn``: what must hold exactly while the job runs.

It is inert unless a worker runs the actor's message: a direct call, or one actor calling another, goes straight through.
It runs after every before-hook and is over before any after-hook, so that no order of middleware matters.
"""

from __future__ import annotations

import functools
from time import monotonic
from typing import TYPE_CHECKING, Any

from .._job_errors import stand_in_for
from ..common.callables import mark_wrapper, unwrapped
from ..errors import QueueTimeoutExceeded
from ..idempotency.options import AlreadyDone, key_of
from ..interrupts import Runner, runner_for
from ..outcomes import Outcome
from .decision import Decision
from .delivery import FINISHED, PREPARED, RUNNING, Delivery, current
from .history import now_ms
from .limits import WARN_RATIO, expired_after, limit_for, warn_if_close

if TYPE_CHECKING:
    from dramatiq import Actor

    from ..idempotency.guard import IdempotencyGuard
    from ..idempotency.options import IdempotencyOptions
    from .broker_state import BrokerState

__all__ = ["wrap_actor"]


def wrap_actor(actor: Actor[..., Any]) -> None:
    """Replace ``actor.fn``, once.

    The function of another actor, which that actor's wrapper may be around, gets a wrapper of its own for this actor. The
    wrapper acts for the broker that delivered the message: one wrapper serves actors of the same name on several brokers.
    """
    name = actor.actor_name
    given: Any = actor.fn
    fn = unwrapped(given)
    if fn is not given and given.dramatiq_policies_wraps.actor_name == name:
        return
    call = runner_for(fn)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        delivery = current.get()
        if delivery is None or delivery.stage != PREPARED or delivery.message.actor_name != name:
            return fn(*args, **kwargs)
        try:
            return _run(delivery.transport.state, delivery, call, fn, args, kwargs)
        except BaseException as error:
            stand_in = stand_in_for(error)
            if stand_in is None:
                raise
        # Outside of the handler: in there the error would become its context.
        raise stand_in

    mark_wrapper(run, fn, name)
    actor.fn = run


def _run(
    state: BrokerState, delivery: Delivery, call: Runner, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if delivery.carried is not None:
        _carry_on(delivery)
    policy = delivery.policy
    timeout = state.timeout
    limit = None
    if timeout is not None and policy is not None:
        if policy.queue_timeout_ms is not None:
            _expire(delivery, policy.queue_timeout_ms)
        limit = limit_for(delivery.message.options, policy.timeout_ms, policy.actor_name)
    delivery.timeout_ms = limit
    admission, guard, batched_completions = (
        state.admission,
        None if policy is None else policy.guard,
        state.batched_completions,
    )
    if batched_completions is not None and not (
        guard is not None
        and guard.key_runs_no_user_code
        and not delivery.redelivered
        and batched_completions.claims.exclusive.is_open
    ):
        batched_completions.flush()
    if admission is None or guard is None:
        return _call(state, delivery, call, fn, args, kwargs)
    exclusive = admission.claims.exclusive
    exclusive.enter(delivery)
    try:
        if guard.asked or delivery.redelivered or "idempotency_key" in delivery.message.options:
            return _run_once(admission, guard, state, delivery, call, fn, args, kwargs)
        return _call(state, delivery, call, fn, args, kwargs)
    finally:
        exclusive.leave(delivery)


def _carry_on(delivery: Delivery) -> None:
    """Settle what an earlier run in this process has left to do, and do not run."""
    assert delivery.carried is not None
    decision, delivery.outbox = delivery.carried
    delivery.skip(decision)


def _run_once(
    admission: IdempotencyGuard,
    guard: IdempotencyOptions,
    state: BrokerState,
    delivery: Delivery,
    call: Runner,
    fn: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    def call_inside_the_timeout(key: Any) -> Any:
        assert guard.call_key is not None
        return _call(state, delivery, guard.call_key, key, args, kwargs)

    delivery.key = key_of(delivery.message, guard, call_inside_the_timeout)
    # What ran so far was not the job.
    delivery.started = delivery.ended = None
    if delivery.key is not None or delivery.redelivered:
        # Outside any interrupt: it would land in the store's client.
        admission.admit(delivery, guard, delivery.key)
    if guard.job is None or guard.call is None:
        return _call(state, delivery, call, fn, args, kwargs)
    try:
        return _call(state, delivery, guard.call, guard.job, args, kwargs)
    except AlreadyDone:
        delivery.started = None
        admission.done(delivery)
        raise


def _call(
    state: BrokerState, delivery: Delivery, call: Runner, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call it with everything that interrupts a job, and its clock running."""
    limit = delivery.timeout_ms
    delivery.stage = RUNNING
    delivery.started = started = monotonic()
    delivery.ended = None
    try:
        return call(
            fn,
            args,
            kwargs,
            deadline=None if limit is None else started + limit / 1_000,
            on_shutdown=state.interrupted_by_shutdown(delivery),
            watch=state.timeout,
            job=delivery,
            after_interrupt=delivery.transport.after_interrupt,
        )
    finally:
        delivery.ended = ended = monotonic()
        delivery.stage = FINISHED
        if limit is not None and limit * WARN_RATIO < (ended - started) * 1_000 <= limit:
            warn_if_close(delivery)


def _expire(delivery: Delivery, queue_timeout_ms: float) -> None:
    """Skip a message that waited too long before its first run."""
    waited = expired_after(delivery.message, queue_timeout_ms, now_ms())
    if waited is None:
        return
    error = QueueTimeoutExceeded(f"waited {waited:.0f} ms in its queue; its queue_timeout is {queue_timeout_ms:.0f} ms")
    delivery.skip(Decision(Outcome.EXPIRED, exception=error, dead_letter=True), str(error))
