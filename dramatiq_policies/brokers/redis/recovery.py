"""Requeue the messages of dead workers on Redis.

Plain Dramatiq does this in one command of a thousand, which takes hours on an idle system. Here one consumer of the fleet checks
each queue every two seconds. A worker counts as dead after ``heartbeat_timeout`` ms of silence. If two consumers check at the same
time, each message still moves once.

Only the clock of the server counts. Workers of this version write heartbeats by this clock. For other workers, the heartbeat must
not have changed for as long (see ``find_silent.lua``).

Each requeued message is marked as redelivered. By the marks, workers count starts without an end.
"""

from __future__ import annotations

import re
from importlib import resources
from time import monotonic
from typing import Any

import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import q_name

from ..._redis import RAW, Script
from ...common.plurals import counted
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
#: Seconds between checks.
_CHECK_EVERY = 2.0
#: Seconds between removals of dead letters older than ``dead_message_ttl``.
_EXPIRE_EVERY = 60.0
#: Messages moved per call, heartbeats read per call.
_BATCH, _PAGE = 100, 1_000
#: For how many ms to watch an old heartbeat at first sight. A living worker sends a heartbeat every few seconds, even with a wrong
#: clock.
_WATCH = 10_000
#: Keys read per SCAN, and seconds of search per check.
_KEYS, _SEARCH = 2_000, 0.1
#: For how many ms one consumer has the search to itself, and the minimal pause between searches.
_SEARCH_ALONE, _SEARCH_AGAIN = 60_000, 10_000


class Recovery:
    """Recovers the messages of one queue."""

    def __init__(self, broker: RedisBroker, queue_name: str) -> None:
        self.broker = broker
        self.client = broker.client
        self.queue = queue_name
        #: Delayed messages have not begun.
        self.may_have_begun = queue_name == q_name(queue_name)
        self.last_check = -_CHECK_EVERY
        #: When to remove expired dead letters next.
        self.expires_at = monotonic() + _EXPIRE_EVERY
        #: Offset of the next check in the heartbeats.
        self.offset = 0
        #: The search for workers without messages: the cursor (None while idle), and the candidates.
        self.cursor: int | None = None
        self.idle: dict[bytes, bytes] = {}
        self.searched = 0.0
        self.may_search = True
        self.lock = f"{broker.namespace}:__forget__"

    def recover_if_due(self) -> None:
        """Every two seconds, write a heartbeat and requeue the messages of silent workers."""
        now = monotonic()
        if now - self.last_check < _CHECK_EVERY:
            return
        self.last_check = now
        broker = self.broker
        # In plain Dramatiq only a fetch writes a heartbeat, and a worker with busy threads fetches nothing.
        pause = round(_CHECK_EVERY * 900)
        where = [BY_SERVER_CLOCK, self.offset, _PAGE]
        kept = ""
        if now >= self.expires_at:
            self.expires_at, kept = now + _EXPIRE_EVERY, broker.dead_message_ttl
        found = self._call(
            _FIND_SILENT, [broker.broker_id, self.queue, broker.heartbeat_timeout, pause, *where, kept, _WATCH]
        )
        if found:
            self.offset, silent = found[0], list(zip(found[1::3], found[2::3], found[3::3], strict=True))
            for worker, heartbeat, holds in silent:
                if holds:
                    self._requeue_messages_of(worker, heartbeat)
            ours = BY_SERVER_CLOCK.encode()
            self._forget(
                {worker: heartbeat for worker, heartbeat, holds in silent if not holds and not worker.endswith(ours)}
            )

    def _requeue_messages_of(self, worker: bytes, heartbeat: bytes) -> None:
        unacked = b":".join([self.broker.namespace.encode(), b"__acks__." + worker + b"." + self.queue.encode()])
        ids = list(self._ask("SMEMBERS", unacked))
        total_requeued = total_dead_letters = 0
        for start in range(0, len(ids), _BATCH):
            triples = [part for redis_id in ids[start : start + _BATCH] for part in (redis_id, b"", b"")]
            while triples:
                requeued, dead_letters, *unread = self._call(
                    _RECOVER, [self.queue, worker, heartbeat, "1" if self.may_have_begun else "", *triples]
                )
                total_requeued, total_dead_letters = total_requeued + requeued, total_dead_letters + dead_letters
                triples = []
                for redis_id, body in zip(unread[::2], unread[1::2], strict=True):
                    triples += [redis_id, body, b"dead" if self._marked(body) else b""]
        if total_requeued:
            logger.warning(
                "Requeued %s of queue %r from a dead worker.", counted(total_requeued, "message"), self.queue
            )
        if total_dead_letters:
            logger.warning(
                "Moved %s of queue %r to the dead-letter queue, for a worker that died before.",
                counted(total_dead_letters, "dead letter"),
                self.queue,
            )

    def _marked(self, body: bytes) -> bool:
        """Return whether the body is a dead letter that a worker of 0.1.0 did not move before its death."""
        try:
            return FAILURE in decode(body).options
        except Exception:
            return False  # The consumer reports unreadable bodies.

    def _forget(self, silent: dict[bytes, bytes]) -> None:
        """Remove silent workers of other versions from the heartbeats if they hold no messages.

        Dramatiq's maintenance calls ``KEYS`` for each leftover worker. Here one ``SCAN`` goes over all keys in small steps. A worker
        without a key, silent during the whole scan, holds no messages.
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
            # Only the maintenance of plain Dramatiq workers gets slower.
            self.may_search = False
            logger.info("Dead workers without messages could not be removed from %r: %s", "__heartbeats__", error)

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
            # A full page means that more are left. Otherwise searches take at most 1 % of the time.
            pause = 1 if len(pairs) >= _PAGE else _SEARCH_AGAIN + round(100_000 * self.searched)
            self._ask("SET", self.lock, "1", "PX", pause)
            self.idle = {}

    def _call(self, script: Script, args: list[Any]) -> Any:
        return script.call(self.client, [self.broker.namespace], args)

    def _ask(self, *command: Any) -> Any:
        return self.client.execute_command(*command, **RAW)
