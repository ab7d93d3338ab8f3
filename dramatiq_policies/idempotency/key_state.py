"""Look up a job's key: the state in the store, and how to forget it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq import Message

from ..common.callables import is_coroutine_callable
from ..errors import ConfigurationError
from . import records
from .options import Register, key_of
from .store_client import StoreDown

if TYPE_CHECKING:
    from dramatiq import Actor

    from ..delivery.actor_policy import IdempotencyOptions
    from .claims import Claims
    from .guard import IdempotencyGuard

__all__ = ["KeyState", "KeyedJob", "job_of_arguments", "job_of_message"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyState:
    """The state of a job's key, from `Idempotency.state`::

        Idempotency.state(charge, 42, 100).state  # "completed"

    Attributes:
      state: ``completed``, ``running``, ``waiting`` (the job failed and a retry is due), or ``none``.
      key: The key of the job.
      message_id: The message that completed the key, runs, or waits. None with ``none``.
      owner: The process that runs the job, as ``host:pid:…``. None unless the job runs.
      since: The begin of the run, ms since the epoch. None unless the job runs.
      starts: How many starts of this run are known. None unless the job runs.
      left_ms: How much longer the store remembers the completion or the lease lasts, in milliseconds, if nothing happens.
        None with ``none``.
    """

    state: str
    key: str
    message_id: str | None = None
    owner: str | None = None
    since: int | None = None
    starts: int | None = None
    left_ms: int | None = None


class KeyedJob(NamedTuple):
    """A job whose key is looked up."""

    claims: Claims
    key: str
    register: Register
    ttl: int

    def state(self) -> KeyState:
        """Read the state of the key.

        Raises:
          UnknownRecord: This version can't read the record in the store.
          Exception: The store's own error, if the store is down.
        """
        key = str(self.key)
        found = self.claims.store.get(self.register.name)
        known = None if found.value is None else (records.Record.decode(found.value), found.left)
        if known is None:
            known = self._known_earlier()
        if known is None:
            return KeyState(state="none", key=key)
        record, left = known
        left = max(0, left - record.retention)
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
                since=record.started_at,
                starts=record.starts,
                left_ms=left,
            )
        return KeyState(state="none", key=key)

    def forget(self) -> bool:
        """Delete the record. Returns whether the store had one."""
        store = self.claims.store
        forgotten = store.delete(self.register.name)
        if self.register.earlier is not None and self._known_earlier() is not None:
            return store.delete(self.register.earlier) or forgotten
        return forgotten

    def _known_earlier(self) -> tuple[records.Record, int] | None:
        """Find the record of 0.1.0, if 0.1.0 used another register for the key."""
        earlier = self.register.earlier
        try:
            return None if earlier is None else self.claims.earlier.find(earlier, self.ttl)
        except StoreDown as error:
            raise error.__cause__ or error from None


def job_of_arguments(
    guard: IdempotencyGuard,
    options: IdempotencyOptions,
    actor: Actor[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> KeyedJob:
    """Find the job of an actor by the actor's arguments; by the message id for ``idempotent=True``.

    Raises:
      ConfigurationError: The actor has no idempotency key, or Dramatiq can't encode the arguments.
    """
    by_id = options.keyed and options.key_of is None
    if by_id and (len(args) != 1 or not isinstance(args[0], str)):
        raise ConfigurationError(
            f"actor {actor.actor_name!r} is idempotent by message id: pass the id, or the message."
        )
    message: Message[Any] = Message(actor.queue_name, actor.actor_name, args, kwargs, {})
    return job_of_message(guard, options, message.copy(message_id=args[0]) if by_id else message)


def job_of_message(guard: IdempotencyGuard, options: IdempotencyOptions, message: Message[Any]) -> KeyedJob:
    """Find the job of a message. Errors as for `job_of_arguments`."""
    where = f"actor {message.actor_name!r}"
    args, kwargs = _as_received(where, message)
    key = key_of(message.copy(args=args, kwargs=kwargs), options, lambda make: _call_key(make, args, kwargs))
    if key is None:
        raise ConfigurationError(f"{where} has no idempotency key. Declare idempotency_key=, or idempotent=True.")
    return KeyedJob(guard.claims, key, guard.register_of(message.actor_name, key), options.ttl)


def _as_received(where: str, message: Message[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a message's arguments as the job receives them."""
    bare: Message[Any] = Message(message.queue_name, message.actor_name, message.args, message.kwargs, {})
    try:
        received = Message.decode(bare.encode())
    except Exception as error:
        raise ConfigurationError(
            f"{where}: the arguments can't be encoded, so no message has them ({type(error).__name__}: "
            f"{error}). Pass the arguments that you pass to send()."
        ) from error
    return tuple(received.args), dict(received.kwargs)


def _call_key(make: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the function that makes the key. A coroutine function gets a new event loop: outside a worker none runs."""
    asked: Any = getattr(make, "__wrapped__", None)
    if not is_coroutine_callable(asked):
        return make(*args, **kwargs)
    with ThreadPoolExecutor(1) as thread:  # The caller's own thread may have a loop running.
        return thread.submit(asyncio.run, asked(*args, **kwargs)).result()
