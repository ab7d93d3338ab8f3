"""Bringing back the messages that dead workers hold, soon.

Dramatiq recovers them in one command of a thousand, which on an idle system is hours. Here the consumer of each queue
looks every two seconds, one of the whole fleet: for workers that have been silent for the broker's ``heartbeat_timeout``,
and for the messages of this queue that they hold. Two consumers that look at once do no harm: each message moves once.

Only the server's clock decides who is silent. A worker of this version writes its heartbeats by that clock; the heartbeat
of any other worker must not have changed for as long (see ``find_silent.lua``).

A message that comes back is marked, since it may have been begun: the marks are how starts that never ended are counted.
"""

from __future__ import annotations

import re
from importlib import resources
from time import monotonic
from typing import Any

import redis
from dramatiq.common import q_name

from ..._redis import RAW, Script
from ...common.safe_logger import SafeLogger
from ...delivery.history import FAILURE
from ...delivery.validation import decode
from .worker_id import BY_SERVER_CLOCK

__all__ = ["Recovery"]

logger = SafeLogger("dramatiq_policies.outcomes")

_FORGET, _FIND_SILENT, _RECOVER = (
    Script(resources.files(__package__).joinpath(f"{name}.lua").read_text())
    for name in ("forget", "find_silent", "recover")
)
#: Every how many seconds to look.
_LOOK_EVERY = 2.0
#: Every how many seconds a consumer removes dead letters that have been kept for the broker's ``dead_message_ttl``.
_EXPIRE_EVERY = 60.0
#: How many messages are moved in one step, and how many heartbeats are read in one.
_BATCH, _PAGE = 100, 1_000
#: For how many milliseconds an old heartbeat is watched that nobody has seen before. A living worker sends one every few
#: seconds, whatever its clock says.
_WATCH = 10_000
#: How many keys one step of a search reads, and for how many seconds one look may search.
_KEYS, _SEARCH = 2_000, 0.1
#: For how many milliseconds one consumer of the fleet may search alone, and the least pause until the next search.
_SEARCH_ALONE, _SEARCH_AGAIN = 60_000, 10_000


class Recovery:
    """Recovers the messages of one queue."""

    def __init__(self, broker: Any, queue_name: str) -> None:
        self.broker = broker
        self.client = broker.client
        self.queue = queue_name
        #: A delayed message was not begun.
        self.begun = queue_name == q_name(queue_name)
        self.looked = -_LOOK_EVERY
        #: When to remove expired dead letters next.
        self.expires_at = monotonic() + _EXPIRE_EVERY
        #: Where the next look begins in the heartbeats.
        self.place = 0
        #: The search for workers that hold nothing: its cursor, None while there is none, and who may hold nothing.
        self.cursor: int | None = None
        self.idle: dict[bytes, bytes] = {}
        self.searched = 0.0
        self.may_search = True
        self.lock = f"{broker.namespace}:__forget__"

    def recover_if_due(self) -> None:
        """Say that this worker lives, and every two seconds bring back what silent workers hold."""
        now = monotonic()
        if now - self.looked < _LOOK_EVERY:
            return
        self.looked = now
        broker = self.broker
        # A worker whose threads are all busy fetches nothing, which is all that Dramatiq takes for a sign of life.
        pause = round(_LOOK_EVERY * 900)
        where = [BY_SERVER_CLOCK, self.place, _PAGE]
        kept = ""
        if now >= self.expires_at:
            self.expires_at, kept = now + _EXPIRE_EVERY, broker.dead_message_ttl
        found = self._call(
            _FIND_SILENT, [broker.broker_id, self.queue, broker.heartbeat_timeout, pause, *where, kept, _WATCH]
        )
        if found:
            self.place, silent = found[0], list(zip(found[1::3], found[2::3], found[3::3], strict=True))
            for worker, beat, holds in silent:
                if holds:
                    self._take_from(worker, beat)
            ours = BY_SERVER_CLOCK.encode()
            self._forget({worker: beat for worker, beat, holds in silent if not holds and not worker.endswith(ours)})

    def _take_from(self, worker: bytes, beat: bytes) -> None:
        unacked = b":".join([self.broker.namespace.encode(), b"__acks__." + worker + b"." + self.queue.encode()])
        ids = list(self._ask("SMEMBERS", unacked))
        moved = dead = 0
        for start in range(0, len(ids), _BATCH):
            triples = [part for redis_id in ids[start : start + _BATCH] for part in (redis_id, b"", b"")]
            while triples:
                came, letters, *unread = self._call(
                    _RECOVER, [self.queue, worker, beat, "1" if self.begun else "", *triples]
                )
                moved, dead = moved + came, dead + letters
                triples = []
                for redis_id, body in zip(unread[::2], unread[1::2], strict=True):
                    triples += [redis_id, body, b"dead" if self._marked(body) else b""]
        if moved:
            logger.warning("%d messages of queue %r come back from a worker that died.", moved, self.queue)
        if dead:
            logger.warning("%d dead letters of queue %r are moved for a worker that died.", dead, self.queue)

    def _marked(self, body: bytes) -> bool:
        """Whether a body is the dead letter of a worker of 0.1.0, which died before it could move it."""
        try:
            return FAILURE in decode(body).options
        except Exception:
            return False  # What can't be read is for the consumer to say.

    def _forget(self, silent: dict[bytes, bytes]) -> None:
        """Have the server forget silent workers of another version that hold nothing of any queue.

        Dramatiq's own maintenance calls ``KEYS`` for each that is left. Here ``SCAN`` goes once over all keys, a few at each
        look: a worker that was silent all the while, and has no key, holds nothing.
        """
        if not self.may_search:
            return
        try:
            if self.cursor is None:
                if not silent or not self._ask("SET", self.lock, "1", "NX", "PX", _SEARCH_ALONE):
                    return
                self.cursor, self.idle, self.searched = 0, silent, 0.0
            self._search(f"{self.broker.namespace}:__acks__.".encode())
        except redis.exceptions.NoPermissionError as error:
            # Whoever uses plain Dramatiq beside this has the more to wait for it; nothing else depends on it.
            self.may_search = False
            logger.info("Workers that have died and hold nothing stay in %r: %s", "__heartbeats__", error)

    def _search(self, prefix: bytes) -> None:
        pattern = re.sub(rb"([*?\[\]\\^-])", rb"\\\1", prefix) + b"*"
        began = monotonic()
        while self.cursor is not None and monotonic() - began < _SEARCH:
            cursor, keys = self._ask("SCAN", self.cursor, "MATCH", pattern, "COUNT", _KEYS)
            for key in keys:
                parts = key[len(prefix) :].split(b".")
                for count in range(1, len(parts)):
                    self.idle.pop(b".".join(parts[:count]), None)
            self.cursor = int(cursor) or None
        self.searched += monotonic() - began
        if self.cursor is None:
            pairs = [part for pair in self.idle.items() for part in pair]
            if pairs:
                self._call(_FORGET, pairs)
            # Where there are many, one look has not read all of them. Else a hundredth of the time at most is for searches.
            pause = 1 if len(pairs) >= _PAGE else _SEARCH_AGAIN + round(100_000 * self.searched)
            self._ask("SET", self.lock, "1", "PX", pause)
            self.idle = {}

    def _call(self, script: Script, args: list[Any]) -> Any:
        return script.call(self.client, [self.broker.namespace], args)

    def _ask(self, *command: Any) -> Any:
        return self.client.execute_command(*command, **RAW)
