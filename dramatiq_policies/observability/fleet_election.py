"""Elect one leader among all processes of a fleet by a lease on Redis; without Redis, among the processes of one command."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .._dramatiq import kind_of
from ..common.clock import now_ms
from ..common.safe_logger import SafeLogger
from .election import CommandElection, Election
from .reports import Report, parse_memory, parse_timed_report

if TYPE_CHECKING:
    from dramatiq.broker import Broker

    from ..delivery.broker_state import BrokerState

__all__ = ["FleetElection", "elect"]

logger = SafeLogger("dramatiq_policies.alerts")


class FleetElection(Election):
    """One leader among all processes with the same key on the same Redis, by a lease.

    While Redis can't be reached, each command has its own leader.

    Parameters:
      client: A client of redis-py, used only by this election.
      key: The prefix of the Redis keys.
      fallback: The election of this command, used while Redis is down.
      fresh_ms: The lifetime of the lease and of reports, in milliseconds.
    """

    hears_all = True

    def __init__(self, client: Any, key: str, fallback: Election, *, fresh_ms: int) -> None:
        super().__init__(fresh_ms)
        self.client = client
        self.key = key
        self.fallback = fallback
        self.me = f"{socket.gethostname()}:{os.getpid()}:{uuid4()}"
        from importlib import resources

        from redis import RedisError

        self._outage = (RedisError, OSError)
        self._lease = client.register_script(resources.files(__package__).joinpath("lease.lua").read_text())

    def is_leader(self) -> bool:
        try:
            won = bool(self._lease(keys=[self.key], args=[self.me, self.fresh_ms]))
        except self._outage:
            return self.fallback.is_leader()
        if not won:
            self.fallback.resign()
        return won

    def publish(self, report: Report) -> None:
        try:
            with self.client.pipeline() as both:
                both.hset(f"{self.key}:notes", self.me, json.dumps([now_ms(), report]))
                both.pexpire(f"{self.key}:notes", self.fresh_ms).execute()
        except self._outage:
            self.fallback.publish(report)

    def reports(self) -> list[Report]:
        try:
            found = []
            for worker, text in self.client.hgetall(f"{self.key}:notes").items():
                timed = parse_timed_report(text)
                if timed is None:
                    continue
                if now_ms() - timed[0] <= self.fresh_ms:
                    found.append(timed[1])
                else:
                    self.client.hdel(f"{self.key}:notes", worker)
        except (*self._outage, ValueError):
            return self.fallback.reports()
        return found

    def save(self, memory: Sequence[Sequence[str]]) -> None:
        self.fallback.save(memory)
        with suppress(*self._outage):
            self.client.set(f"{self.key}:memory", json.dumps(memory), px=self.memory_ms)

    def saved(self) -> list[list[str]] | None:
        try:
            text = self.client.get(f"{self.key}:memory")
            return None if text is None else parse_memory(text)
        except (*self._outage, ValueError):
            return self.fallback.saved()

    def resign(self) -> None:
        self.fallback.resign()
        with suppress(*self._outage):
            self.client.hdel(f"{self.key}:notes", self.me)
            self._lease(keys=[self.key], args=[self.me, 0])
        self.client.connection_pool.disconnect()


def elect(state: BrokerState, interval: int) -> Election:
    """Return the election of the queue monitor: of the fleet, of this command, or of this process alone.

    Parameters:
      state: The state of the broker.
      interval: The time between two calls of `Election.is_leader`, in milliseconds.
    """
    fresh = max(1_000, 3 * interval)
    queues = "\n".join(sorted(state.broker.get_declared_queues()))
    name = f"queues-{hashlib.blake2b(queues.encode(), digest_size=6).hexdigest()}"
    fallback = CommandElection(name, os.getppid(), fresh_ms=fresh) if state.in_command else Election(fresh)
    at_hand = _redis_of(state.broker)
    if at_hand is None:
        return fallback
    from ..brokers.redis.queue_reader import own_client

    client, namespace = at_hand
    try:
        return FleetElection(own_client(client), f"{namespace}:__monitor__.{name}", fallback, fresh_ms=fresh)
    except Exception:
        logger.exception(
            "A %s can't hold a lease: one process per command monitors the queues, not one for all hosts.",
            type(client).__name__,
        )
        return fallback


def _redis_of(broker: Broker) -> tuple[Any, str] | None:
    """Return the Redis client and namespace of the broker or of a store, or None."""
    stores = (getattr(middleware, "store", None) for middleware in broker.middleware)
    for place in (broker if kind_of(broker) == "redis" else None, *stores):
        # No ``getattr``: a RedisBroker turns each unknown name into a command.
        known = getattr(place, "__dict__", {})
        if hasattr(known.get("client"), "connection_pool"):
            return known["client"], str(known.get("namespace", "dramatiq"))
    return None
