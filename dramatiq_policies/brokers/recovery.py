"""Bringing back what dead workers had taken, soon.

Dramatiq does it in one command of a thousand, which on an idle system is hours. Here the consumer of each queue looks every
two seconds, one of the whole fleet: for workers that have been silent for the broker's ``heartbeat_timeout``, and for
the messages of this queue that they hold. More than one doing it at once does no harm: each message is moved once.

What comes back is marked, since it may have been begun: the marks are how starts that never ended are counted.
"""

from __future__ import annotations

from importlib import resources
from time import monotonic
from typing import Any

from dramatiq import Message
from dramatiq.common import q_name

from ..consumer import REDELIVERED
from ..history import now_ms
from ..safe_logger import SafeLogger

__all__ = ["Recovery"]

logger = SafeLogger("dramatiq_policies.outcomes")

_RECOVER = resources.files(__package__).joinpath("recover.lua").read_text()
#: Every how many seconds to look.
_LOOK_EVERY = 2.0
#: How many messages are moved in one step.
_BATCH = 100


class Recovery:
    """Recovers the messages of one queue."""

    def __init__(self, broker: Any, queue_name: str) -> None:
        self.broker = broker
        self.client = broker.client
        self.queue = queue_name
        self.script = self.client.register_script(_RECOVER)
        self.looked = -_LOOK_EVERY
        #: Workers that died and hold nothing of this queue, with the time of their last heartbeat.
        self.empty: dict[bytes, float] = {}

    def look(self) -> None:
        """Say that this worker lives, and every two seconds bring back what the dead hold."""
        now = monotonic()
        if now - self.looked < _LOOK_EVERY:
            return
        self.looked = now
        namespace = self.broker.namespace
        heartbeats = f"{namespace}:__heartbeats__"
        pipeline = self.client.pipeline(transaction=False)
        # A worker whose threads are all busy fetches nothing, which is all that Dramatiq takes for a sign of life.
        pipeline.zadd(heartbeats, {self.broker.broker_id: now_ms()})
        pipeline.set(f"{namespace}:__recovery__.{self.queue}", 1, nx=True, px=round(_LOOK_EVERY * 900))
        if not pipeline.execute()[1]:
            return
        silent_since = now_ms() - self.broker.heartbeat_timeout
        dead = self.client.zrangebyscore(heartbeats, "-inf", silent_since, withscores=True)
        self.empty = {worker: beat for worker, beat in dead if self.empty.get(worker) == beat}
        for worker, beat in dead:
            if worker not in self.empty:
                self._take_from(worker, silent_since)
                self.empty[worker] = beat

    def _take_from(self, worker: bytes | str, silent_since: int) -> None:
        name = worker.decode() if isinstance(worker, bytes) else worker
        ids = list(self.client.smembers(f"{self.broker.namespace}:__acks__.{name}.{self.queue}"))
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            bodies = self.client.hmget(f"{self.broker.namespace}:{self.queue}.msgs", some)
            pairs = [
                part
                for redis_id, body in zip(some, bodies, strict=True)
                for part in (redis_id, b"" if body is None else self._marked(body))
            ]
            moved = self.script(
                keys=[self.broker.namespace], args=[self.queue, name, silent_since, *pairs], client=self.client
            )
            if moved:
                logger.warning("%d messages of queue %r come back from a worker that died.", moved, self.queue)

    def _marked(self, body: Any) -> Any:
        if self.queue != q_name(self.queue):
            return body  # A delayed message was not begun.
        try:
            message: Message[Any] = Message.decode(body)
            return message.copy(options={REDELIVERED: True}).encode()
        except Exception:
            return body  # What can't be read is for the consumer to say.
