"""Running a job once, also when its message arrives twice and its worker dies."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dramatiq import Actor, Message

from .._dramatiq import kind_of
from ..common.callables import is_coroutine_callable
from ..common.durations import CENTURY_MS
from ..common.safe_logger import SafeLogger
from ..errors import ConfigurationError, checked_duration
from ..idempotency import records
from ..idempotency.claims import Claims, StoreDown
from ..idempotency.guard import IdempotencyGuard
from ..idempotency.options import OPTIONS, Register, checked_crashes, key_of
from ..idempotency.services import place_of, record_service, server_of
from ..stores import IdempotencyStore
from .base import PolicyMiddleware, order_middleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState
    from .timeout import StuckJob

__all__ = ["Idempotency", "KeyState"]

alerts = SafeLogger("dramatiq_policies.alerts")

#: How long, in seconds, a worker process is left to say that it has booted, before it begins what may kill it.
_BOOTING = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyState:
    """What idempotency remembers of a job.

    Attributes:
      state: ``completed``, ``running``, ``waiting`` (it failed, and its retry is due), or ``none``.
      key: The key, as the actor makes it.
      message_id: Of the message that completed it, runs, or waits.
      owner: The process that runs it, as ``host:pid:…``.
      since: Since when it runs, ms since the epoch.
      starts: How many starts of this run are known.
      left_ms: For how much longer this holds if nothing happens: the key is remembered, or the lease lasts.
    """

    state: str
    key: str
    message_id: str | None = None
    owner: str | None = None
    since: int | None = None
    starts: int | None = None
    left_ms: int | None = None


class Idempotency(PolicyMiddleware):
    """Skips duplicates of completed jobs, defers those of running ones, and takes over what a dead worker left.

    Actors ask for it by ``idempotent=True`` (the key is the message id), ``idempotency_key`` (a template over the actor's
    arguments, or a callable that takes them), or a message by ``send_with_options(idempotency_key=…)``. ``done_when`` (a
    callable that takes the actor's arguments) says from outside that there is nothing left to do.

    What it cannot do: a worker killed between an effect and its record leaves an effect that is made again. Hand
    ``current_job().idempotency_key`` to the service that makes the effect, or commit the key with it.

    Parameters:
      store: An `IdempotencyStore`. None, the default: on a RedisBroker its own Redis over connections of its own, in a
        namespace made of the broker's; on a StubBroker memory; elsewhere there is none, and an actor that asks for
        idempotency is refused. Services that share a store need a namespace each: see `RedisStore`.
      lease: For how long a claim holds if its process falls silent, in milliseconds or as a ``timedelta``. It is renewed
        while the job runs, and must be longer than a renewal may take. Default 60,000.
      ttl: How long a completed key is remembered; the actor option ``idempotency_ttl`` overrides it. Default 24 h.
      on_store_error: ``"retry"``: while the store is down a message that needs it waits. ``"run"``: it runs, and that is
        said. Default ``"retry"``.
      max_crashes: After how many starts that never ended (SIGKILL, out of memory, segfault) a message goes to the dead
        letters, reason ``crashed``. The last start is made while no other job runs in its process, and only such a start
        is proof, so that jobs beside a killer are not blamed. A process that is killed after its shutdown has begun
        counts for none. None switches it off. The actor option of that name overrides it. Default 3.

    Raises:
      ConfigurationError: An argument makes no sense.
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

    @property
    def actor_options(self) -> set[str]:
        return set(OPTIONS)

    def for_stub(self) -> Self:
        from ..stores.memory import MemoryStore

        copy = super().for_stub()
        copy.store, copy.claims, copy.guard = MemoryStore(), None, None
        return copy

    @staticmethod
    def has_default_store(broker: Broker) -> bool:
        """Whether it needs no store there."""
        return kind_of(broker) in ("stub", "redis")

    def attach(self, state: BrokerState) -> None:
        store = self.store = _default_store(state.broker) if self.store is None else self.store
        if store is None:
            return
        self.claims = Claims(store, self.lease)
        self.guard = guard = IdempotencyGuard(
            state,
            self.claims,
            run_without_store=self.on_store_error == "run",
            place=place_of(state.broker, store),
        )
        state.postpone = guard.contention.postpone
        state.add_around_job(guard.around_job, order=1)
        state.guard_defaults = (self.ttl, self.max_crashes)

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        state = order_middleware(broker)
        if self.claims is not None:
            self.claims.stopping = False
        if state.in_command:
            state.booting_until = time.monotonic() + _BOOTING

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        state = order_middleware(broker)
        if self.claims is None:
            return
        trips = getattr(self.store, "trips", None)
        if trips is not None:
            from ..idempotency.batched_completion import BatchedCompletions  # It needs redis.

            state.batched_completions = (
                BatchedCompletions(state, self.claims, trips) if BatchedCompletions.is_safe(state) else None
            )
        if self._excuse_neighbours not in state.stuck_subscribers:
            state.stuck_subscribers.append(self._excuse_neighbours)
        try:
            warnings = getattr(self.store, "warnings", None)
            if callable(warnings):
                for warning in self.claims.ask(warnings):
                    alerts.warning(warning)
            if kind_of(broker) != "stub":
                self.claims.earlier.mark()
                self._look_for_neighbours(state)
        except StoreDown:
            pass  # Said already.

    def _look_for_neighbours(self, state: BrokerState) -> None:
        assert self.guard is not None
        claims, broker = self.guard.claims, state.broker
        queues, server = keyed_queues(state), server_of(broker, claims.store)
        if server is None or not queues:
            return
        for found in claims.ask(partial(record_service, claims.store, server, self.guard.place, queues)):
            alerts.warning("%s.", found)

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self.claims is not None:
            self.claims.excuse_all()

    def before_worker_thread_shutdown(self, broker: Broker, thread: Any) -> None:
        if self.attached_to is not None and self.attached_to.batched_completions is not None:
            self.attached_to.batched_completions.flush()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self.claims is not None:
            self.claims.close()

    def _excuse_neighbours(self, stuck: StuckJob) -> None:
        """The process may be about to end itself: only the stuck job is to be blamed for that."""
        if self.attached_to is None or self.attached_to.timeout is None or self.claims is None:
            return
        if self.attached_to.timeout.on_stuck == "exit":
            for delivery in list(self.claims.exclusive.running):
                if delivery.message.message_id != stuck.message_id:
                    self.claims.uncount_start(delivery)

    @staticmethod
    def state(actor: Actor[..., Any] | Message[Any], *args: Any, **kwargs: Any) -> KeyState:
        """What is remembered of a job: ``Idempotency.state(send_confirmation, 42)``.

        Parameters:
          actor: The actor, and then what it is called with; or a `Message`. For an actor with ``idempotent=True`` the
            argument is a message id. Arguments are taken as a worker receives them: through Dramatiq's encoder.

        Raises:
          ConfigurationError: The actor has no idempotency key, or its arguments can't be sent.
          Exception: The store can't be asked, or holds what this version can't read (`UnknownRecord`).
        """
        job = _lookup(actor, args, kwargs)
        key = str(job.key)
        found = job.claims.store.get(job.register.name)
        known = None if found.value is None else (records.Record.decode(found.value), found.left)
        if known is None:
            known = job.known_earlier()
        if known is None:
            return KeyState(state="none", key=key)
        record, left = known
        left = max(0, left - record.keep)
        if record.state == records.COMPLETED:
            return KeyState(state="completed", key=key, message_id=record.message_id, left_ms=left)
        if record.state == records.WAITING and left:
            return KeyState(state="waiting", key=key, message_id=record.message_id, left_ms=left)
        if record.state in (records.RUNNING, records.ENDING):
            return KeyState(
                state="running",
                key=key,
                message_id=record.message_id,
                owner=record.owner,
                since=record.since,
                starts=record.starts,
                left_ms=left,
            )
        return KeyState(state="none", key=key)

    @staticmethod
    def forget(actor: Actor[..., Any] | Message[Any], *args: Any, **kwargs: Any) -> bool:
        """Forget a job's key, so that its next message runs; whether anything was remembered. As `state`.

        Of a job that runs now only the record is lost: it goes on, and a second one may begin beside it.
        """
        job = _lookup(actor, args, kwargs)
        forgotten = job.claims.store.delete(job.register.name)
        if job.register.earlier is not None and job.known_earlier() is not None:
            return job.claims.store.delete(job.register.earlier) or forgotten
        return forgotten


class _Job(NamedTuple):
    """What `Idempotency.state` is asked about."""

    claims: Claims
    key: str
    register: Register
    ttl: int

    def known_earlier(self) -> tuple[records.Record, int] | None:
        """What 0.1.0 left of it, where that had another register."""
        earlier = self.register.earlier
        try:
            return None if earlier is None else self.claims.earlier.find(earlier, self.ttl)
        except StoreDown as error:
            raise error.__cause__ or error from None


def _lookup(actor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Job:
    message = actor if isinstance(actor, Message) else None
    if message is not None:
        from dramatiq import get_broker

        actor = get_broker().get_actor(message.actor_name)
        args, kwargs = message.args, message.kwargs
    where = f"actor {actor.actor_name!r}"
    state = order_middleware(actor.broker)
    policy = state.policies.get(actor.actor_name)
    options, guard = None if policy is None else policy.guard, guard_on(state)
    if options is None or guard is None:
        raise ConfigurationError(f"{where}: the broker has no Idempotency with a store.")
    if message is None:
        by_id = options.keyed and options.key_of is None
        if by_id and (len(args) != 1 or not isinstance(args[0], str)):
            raise ConfigurationError(f"{where} is idempotent by message id: pass the id, or the message.")
        message = Message(actor.queue_name, actor.actor_name, args, kwargs, {})
        if by_id:
            message = message.copy(message_id=args[0])
    args, kwargs = _as_received(where, message)
    message = message.copy(args=args, kwargs=kwargs)
    key = key_of(message, options, lambda make: _ask(make, args, kwargs))
    if key is None:
        raise ConfigurationError(f"{where} has no idempotency key.")
    return _Job(guard.claims, key, guard.register_of(actor.actor_name, key), options.ttl)


def _as_received(where: str, message: Message[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A message's arguments as its job receives them."""
    bare: Message[Any] = Message(message.queue_name, message.actor_name, message.args, message.kwargs, {})
    try:
        received = Message.decode(bare.encode())
    except Exception as error:
        raise ConfigurationError(
            f"{where}: its arguments can't be sent, so no message has them ({type(error).__name__}: {error}). "
            "Pass what you pass to send()."
        ) from error
    return tuple(received.args), dict(received.kwargs)


def _ask(make: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what makes the key; a coroutine function on a loop of its own, for outside a worker there is none."""
    asked: Any = getattr(make, "__wrapped__", None)
    if not is_coroutine_callable(asked):
        return make(*args, **kwargs)
    with ThreadPoolExecutor(1) as thread:  # The caller's own thread may have a loop running.
        return thread.submit(asyncio.run, asked(*args, **kwargs)).result()


def guard_on(state: BrokerState) -> IdempotencyGuard | None:
    """The guard of a broker's Idempotency; None without one that has a store."""
    return next((one.guard for one in state.attached if isinstance(one, Idempotency)), None)


def keyed_queues(state: BrokerState) -> list[tuple[str, str]]:
    """The actors of a broker that have keys, each with its queue."""
    actors = state.broker.actors
    return [
        (name, actors[name].queue_name)
        for name, policy in state.policies.items()
        if name in actors and policy.guard is not None and policy.guard.keyed
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
