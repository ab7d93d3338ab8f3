"""Settle a message on Redis in one step: publish the follow-up messages, store the dead letter, complete the key, acknowledge."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

import redis

from ..._redis import CommandBatcher, Script
from ...idempotency.claim import Claim
from .calls import RedisCalls

if TYPE_CHECKING:
    from ...delivery.broker_state import BrokerState
    from ...delivery.delivery import Delivery
    from ...stores.redis import RedisStore

__all__ = ["MISSING", "REASSIGNED", "SETTLED", "SettleScript"]

_SETTLE = Script(resources.files(__package__).joinpath("settle.lua").read_text())
#: The replies of the script: nothing was done, because another worker must settle the message; the message is settled; the message
#: is settled, and Redis no longer had its body.
REASSIGNED, SETTLED, MISSING = 0, 1, 2


class SettleScript:
    """Runs the script for the messages of one queue. A repeated call does nothing, and returns `REASSIGNED`.

    Parameters:
      state: The state of the broker.
      queue: The queue of the messages.
      call: Calls Redis, and translates errors.
      batcher: Sends commands over the broker's connection.
    """

    def __init__(self, state: BrokerState, queue: str, call: RedisCalls, batcher: CommandBatcher) -> None:
        self._state = state
        self._broker: Any = state.broker
        self._queue = queue
        self._call = call
        self._batcher = batcher
        #: The store of the last claim, and whether the store is on this server.
        self._store: RedisStore | None = None
        self._is_beside = False

    def can_complete(self, delivery: Delivery) -> bool:
        """Whether the script can also complete the delivery's key: the store is on this server."""
        if not delivery.completes_key():
            return False
        store = self._state.idempotency.claims.store
        if store is not self._store:
            self._store = cast("RedisStore", store)
            is_beside = getattr(store, "is_beside", None)
            self._is_beside = is_beside is not None and is_beside(self._broker.client)
        return self._is_beside

    def run(
        self, redis_id: str, dead: bytes = b"", sends: Sequence[str | bytes] = (), keep_unacked: bool = False
    ) -> int:
        """Settle a message. Returns `REASSIGNED` if this process no longer holds the message, else `SETTLED` or `MISSING`.

        Parameters:
          redis_id: The id of the message.
          dead: The dead letter; empty for none.
          sends: The follow-up messages: queue, id and body of each message.
          keep_unacked: Whether to leave the message unacknowledged.
        """
        return int(self._call(self._batcher.call, *self.command(redis_id, dead, sends, keep_unacked)))

    def run_with_completion(self, redis_id: str, dead: bytes, sends: Sequence[str | bytes], claim: Claim) -> int | None:
        """Settle a message and complete the key, with a reply as of `run`. Returns None if two steps are needed.

        The command goes over the store's connection, to share round trips, and over the broker's connection if the store's
        connection fails.
        """
        command = self.command(redis_id, dead, sends, completes=claim)
        assert self._store is not None  # `can_complete` has set it.
        try:
            return int(self._store.batcher.call(*command))
        except redis.DataError:
            raise
        except (redis.RedisError, OSError):
            try:
                return int(self._batcher.call(*command))
            except (redis.RedisError, OSError):
                # Perhaps this user may not touch the store's keys. If the server is down, the next step raises.
                return None

    def command(
        self,
        redis_id: str,
        dead: bytes = b"",
        sends: Sequence[str | bytes] = (),
        keep_unacked: bool = False,
        completes: Claim | None = None,
    ) -> tuple[Any, ...]:
        """Return the command that settles a message."""
        broker = self._broker
        keys, completed, ttl, held, companion = [broker.namespace], b"", 0, b"", [b"", 0]
        if completes is not None:
            assert self._store is not None  # As above.
            name = self._store.name_of(completes.name)
            keys.append(name)
            held = completes.value
            completed, ttl, *found = self._state.idempotency.claims.completion(completes)
            if found:
                keys.append(self._store.companion_of(name))
                companion = found
        args = [broker.broker_id, self._queue, redis_id, dead, "keep" if keep_unacked else "", completed, ttl, held]
        args += [*companion, *sends]
        return _SETTLE.command(keys, args)
