"""Middleware: run each job once, even if a message arrives twice or a worker dies."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dramatiq import Actor, Message

from .._dramatiq import kind_of
from ..common.durations import CENTURY_MS
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_duration
from ..idempotency.claims import Claims
from ..idempotency.guard import IdempotencyGuard
from ..idempotency.key_state import KeyedJob, KeyState, job_of_arguments, job_of_message
from ..idempotency.options import checked_crashes, without_store
from ..idempotency.services import record_service, server_of, service_scope_of
from ..idempotency.store_client import StoreDown
from ..stores import IdempotencyStore
from .base import PolicyMiddleware, arrangement_of, order_middleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState
    from ..outcomes import StuckJob

__all__ = ["Idempotency", "KeyState"]

alerts = SafeLogger("dramatiq_policies.alerts")

#: How long, in seconds, a booting worker process holds redelivered messages back. The process must report its boot before
#: a redelivered job may kill the process.
_BOOTING = 2.0


class Idempotency(PolicyMiddleware):
    """Run each job once, even if a message arrives twice or a worker dies::

        install(broker, idempotency=Idempotency(RedisStore.from_url("redis://localhost:6379/1", namespace="shop")))

        @actor(idempotency_key="charge:{order_id}")
        def charge(order_id, amount):
            payments.charge(amount, idempotency_key=current_job().idempotency_key)

    The worker skips a message whose key is completed, defers a message while another worker runs the key, and takes over the
    job of a dead worker. Limit: if a worker dies between the job's effect and the record of its completion, the job runs
    again. So pass ``current_job().idempotency_key`` to the service that makes the effect, or commit the key with the effect.

    Parameters:
      store: An `IdempotencyStore`. Default None: on a RedisBroker the broker's Redis, over separate connections and in a
        namespace derived from the broker's; on a StubBroker memory; on other brokers no store, and declaring an actor with
        a key raises. Services that share a store need a namespace each: see `RedisStore`.
      lease: How long a claim holds after its process has fallen silent, in milliseconds or as a ``timedelta``. The worker
        renews the lease while the job runs. Must be longer than a renewal may take. Default 60,000 (one minute).
      ttl: How long the store remembers a completed key, in milliseconds or as a ``timedelta``. Default 24 hours.
      on_store_error: While the store is down, a message with a key waits (``"retry"``, the default), or runs unguarded with
        a warning in the log (``"run"``).
      max_crashes: After how many starts that never ended (SIGKILL, out of memory, segfault) a message becomes a dead letter
        with reason ``crashed``. None for no limit. Default 3. The worker makes the last start while no other job runs in
        the process. Only a crash of this start is proof, so jobs beside a killer are not blamed. A kill after the shutdown
        has begun counts for no job.

    Actor options:
      idempotent: True for the message id as key.
      idempotency_key: A template over the actor's arguments, or a callable that takes the arguments. You can also give one
        message a key: ``send_with_options(idempotency_key=…)``.
      done_when: A callable that takes the actor's arguments. If the result is true, the worker skips the job.
      idempotency_ttl: As ``ttl``, for one actor.
      max_crashes: As above, for one actor.

    Raises:
      ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        store: IdempotencyStore | None = None,
        *,
        lease: int | timedelta = 60_000,
        ttl: int | timedelta = 86_400_000,
        on_store_error: Literal["retry", "run"] = "retry",
        max_crashes: int | None = 3,
    ) -> None:
        where = "Idempotency"
        if store is not None and not isinstance(store, IdempotencyStore):
            raise ConfigurationError.of_option(where, "store", "an IdempotencyStore or None", store, secret=True)
        if on_store_error not in ("retry", "run"):
            raise ConfigurationError.of_option(where, "on_store_error", '"retry" or "run"', on_store_error)
        self.store = store
        self.lease = checked_duration(where, "lease", lease, least=1, most=CENTURY_MS)
        self.ttl = checked_duration(where, "ttl", ttl, least=1, most=CENTURY_MS)
        self.on_store_error = on_store_error
        self.max_crashes = checked_crashes(where, max_crashes)
        self.claims: Claims | None = None
        self.guard: IdempotencyGuard | None = None

    def for_stub(self) -> Self:
        from ..stores.memory import MemoryStore

        copy = super().for_stub()
        # A store in the application's database stays there, since a transaction completes its keys.
        of_store = getattr(self.store, "for_stub", None)
        copy.store = MemoryStore() if of_store is None else of_store()
        copy.claims = copy.guard = None
        return copy

    @staticmethod
    def has_default_store(broker: Broker) -> bool:
        """Return whether Idempotency has a default store on this broker."""
        return kind_of(broker) in ("stub", "redis")

    def attach(self, state: BrokerState) -> None:
        store = self.store = _default_store(state.broker) if self.store is None else self.store
        if store is None:
            return
        self.claims = state.idempotency.keeper = Claims(store, int(self.lease))
        self.guard = guard = IdempotencyGuard(
            state,
            self.claims,
            run_without_store=self.on_store_error == "run",
            scope=service_scope_of(state.broker, store),
        )
        state.idempotency.postpone = guard.contention.postpone
        state.add_around_job(guard.around_job, order=1)
        state.idempotency.defaults = (int(self.ttl), self.max_crashes)

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        state = order_middleware(broker)
        if state.in_command:
            state.idempotency.booting_until = time.monotonic() + _BOOTING
        if self.claims is not None:
            self.claims.stopping = False
            with suppress(StoreDown):  # The store client has logged the outage.
                self.claims.earlier.mark()

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        state = order_middleware(broker)
        if self.claims is None:
            return
        batcher = getattr(self.store, "batcher", None)
        if batcher is not None:
            from ..idempotency.batched_completion import BatchedCompletions  # It needs redis.

            state.idempotency.batched_completions = (
                BatchedCompletions(state, batcher) if BatchedCompletions.is_safe(state) else None
            )
        if self._uncount_other_jobs not in state.outcomes.stuck_subscribers:
            state.outcomes.stuck_subscribers.append(self._uncount_other_jobs)
        try:
            warnings = getattr(self.store, "warnings", None)
            if callable(warnings):
                for warning in self.claims.call_store(warnings):
                    alerts.warning(warning)
            if kind_of(broker) != "stub":
                self._look_for_neighbours(state)
        except StoreDown:
            pass  # The store client has logged the outage.

    def _look_for_neighbours(self, state: BrokerState) -> None:
        assert self.guard is not None
        claims, broker = self.guard.claims, state.broker
        queues, server = keyed_queues(state), server_of(broker, claims.store)
        if server is None or not queues:
            return
        for found in claims.call_store(partial(record_service, claims.store, server, self.guard.scope, queues)):
            alerts.warning("%s.", found)

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self.claims is not None:
            self.claims.uncount_running_starts()

    def before_worker_thread_shutdown(self, broker: Broker, thread: object) -> None:
        batched = None if self.attached_to is None else self.attached_to.idempotency.batched_completions
        if batched is not None:
            batched.flush()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self.claims is not None:
            self.claims.close()

    def _uncount_other_jobs(self, stuck: StuckJob) -> None:
        """With ``on_stuck="exit"``, count a crash only for the stuck job and not for the other jobs of the process."""
        if self.attached_to is None or self.attached_to.timeout is None or self.claims is None:
            return
        if self.attached_to.timeout.on_stuck == "exit":
            for delivery in list(self.claims.exclusive.running):
                if delivery.message.message_id != stuck.message_id:
                    self.claims.uncount_start(delivery)

    @staticmethod
    def state(actor: Actor[..., Any] | Message[Any], *args: Any, **kwargs: Any) -> KeyState:
        """Read the state of a job's key: ``Idempotency.state(charge, 42, 100)``.

        Parameters:
          actor: The actor, or a `Message`.
          args, kwargs: The actor's arguments. For an actor with ``idempotent=True``, the message id. Arguments pass through
            Dramatiq's encoder, as on their way to a worker.

        Raises:
          ConfigurationError: The actor has no idempotency key, or Dramatiq can't encode the arguments.
          UnknownRecord: This version can't read the record in the store.
          Exception: The store's own error, if the store is down.
        """
        return _lookup(actor, args, kwargs).state()

    @staticmethod
    def forget(actor: Actor[..., Any] | Message[Any], *args: Any, **kwargs: Any) -> bool:
        """Forget a job's key and let the next message run: ``Idempotency.forget(charge, 42, 100)``.

        A running job goes on without a record, and a second run may begin at the same time. Parameters and errors as for
        `state`.

        Returns:
          Whether the store had a record of the key.
        """
        return _lookup(actor, args, kwargs).forget()


def _lookup(given: Actor[..., Any] | Message[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> KeyedJob:
    if isinstance(given, Message):
        from dramatiq import get_broker

        message, actor = given, get_broker().get_actor(given.actor_name)
    else:
        message, actor = None, given
    state = order_middleware(actor.broker)
    policy = state.policies.get(actor.actor_name)
    options, guard = None if policy is None else policy.idempotency, guard_on(state)
    if options is None or guard is None:
        raise without_store(f"actor {actor.actor_name!r}")
    if message is not None:
        return job_of_message(guard, options, message)
    return job_of_arguments(guard, options, actor, args, kwargs)


def guard_on(state: BrokerState) -> IdempotencyGuard | None:
    """Return the guard of a broker's Idempotency; None if the broker has no Idempotency with a store."""
    return next((one.guard for one in arrangement_of(state).attached if isinstance(one, Idempotency)), None)


def keyed_queues(state: BrokerState) -> list[tuple[str, str]]:
    """Return the broker's actors with keys, each with its queue."""
    actors = state.broker.actors
    return [
        (name, actors[name].queue_name)
        for name, policy in state.policies.items()
        if name in actors and policy.idempotency is not None and policy.idempotency.keyed
    ]


def _default_store(broker: Broker) -> IdempotencyStore | None:
    kind = kind_of(broker)
    if kind == "stub":
        from ..stores.memory import MemoryStore

        return MemoryStore()
    if kind == "redis":
        from ..stores.redis import RedisStore

        given: Any = broker
        namespace = "idem" if given.namespace == "dramatiq" else f"{given.namespace}:idem"
        return RedisStore.beside(given.client, namespace=namespace)
    return None
