"""The transport on Redis.

A single script publishes the follow-up messages and acknowledges, so no crash or lost reply falls between the two. A message's
id is the id under which Redis stores the body; an id inside the body is ignored. Any error of Redis counts as a lost connection,
except permanent errors (see `calls`).
"""

from __future__ import annotations

from collections import deque
from importlib import resources
from typing import Any
from uuid import uuid4

import redis
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import compute_backoff
from dramatiq.errors import BrokerConnectionError

from ... import _dramatiq
from ..._redis import CommandBatcher, Script
from ...common.safe_logger import SafeLogger
from ...delivery.broker_state import BrokerState
from ...delivery.consumer import REDELIVERED
from ...delivery.delivery import Delivery, DeliveryReassigned, EarlierRun
from ...delivery.history import FAILURE
from ...delivery.outgoing import OutgoingMessage
from ...delivery.refusals import IN_A_ROW, Fault
from ...delivery.transport import Transport
from ...errors import MalformedMessage
from ...idempotency.claim import claim_of
from ..batch import prepared
from ..ended_runs import EndedRuns, earlier_run_of, is_recorded_by_store
from .calls import RedisCalls
from .data_loss import DataLoss
from .orphans import Orphans
from .prefetch import InFlight, PrefetchWindow
from .recovery import Recovery
from .settle_script import MISSING, REASSIGNED, SETTLED, SettleScript

__all__ = ["RedisTransport"]

logger = SafeLogger("dramatiq_policies.outcomes")

_FETCH = Script(resources.files(__package__).joinpath("fetch.lua").read_text())


class RedisTransport(Transport):
    """Fetches, acknowledges and dead-letters on Redis."""

    acks_with_follow_ups = True
    broker: RedisBroker

    def __init__(self, state: BrokerState, inner: Any, queue_name: str, prefetch: int) -> None:
        super().__init__(state, inner, queue_name, prefetch)
        self.client = inner.broker.client
        self.batcher = state.shared(CommandBatcher, self.client)
        self.call = state.shared(RedisCalls, state)
        self.settling = SettleScript(state, queue_name, self.call, self.batcher)
        self.timeout_ms = inner.timeout
        self.ended = state.shared(EndedRuns)
        self.losses = state.shared(DataLoss, state, self.batcher)
        #: Fetched messages, not yet taken: id, body, and b"1" if recovered from a dead worker.
        self.cache: deque[tuple[bytes, bytes, bytes]] = deque()
        self.window = PrefetchWindow(state.shared(InFlight).ids_of(queue_name), inner.prefetch)
        self.recovery = Recovery(inner.broker, queue_name)
        self.orphans = Orphans(state, inner.broker, queue_name, self.window)
        #: How many fetches in a row returned nothing.
        self.misses = 0

    def take(self) -> MessageProxy | None:
        while True:
            if not self.cache and not self._fetch():
                return None
            raw_id, body, recovered = self.cache.popleft()
            message = self._received(raw_id, body, recovered)
            # If the id is in hand already, the message was enqueued twice, or requeued and fetched again. Run it once.
            if message is not None and self.window.take(message.options["redis_message_id"]):
                proxy = MessageProxy(message)
                if not self.is_delay_queue:
                    _dramatiq.cache_fields(proxy, message, body)
                    if self.ended.known:
                        self._recall(proxy)
                return proxy

    def _received(self, raw_id: bytes, body: bytes, recovered: bytes = b"") -> Message[Any] | None:
        """Return the message stored under an id; None if the message is settled already: the body can't be read."""
        try:
            redis_id = raw_id.decode()
            message = self.decode(body)
            if type(message.options.get("redis_message_id", "")) is not str:
                raise MalformedMessage("redis_message_id is not a string")
        except Exception as error:
            self._settle_unreadable(raw_id, error)
            return None
        if self.breaker.count:
            self.breaker.readable()
        # The body may contain another message's id, or an id that can't be encoded.
        message.options["redis_message_id"] = redis_id
        if recovered:
            if FAILURE in message.options:
                # A dead letter that a worker of 0.1.0 had no time to move.
                self.call(self.broker.do_nack, self.source, raw_id)
                return None
            message.options[REDELIVERED] = True
        return message

    def _settle_unreadable(self, raw_id: bytes, error: Exception) -> None:
        """Dead-letter an unreadable body, or leave the body on its queue during a pause."""
        if self.breaker.unreadable(error):
            # Behind the rest of the queue.
            self.call(self.broker.do_requeue, self.source, raw_id)
            return
        self.call(self.broker.do_nack, self.source, raw_id)
        self.report_malformed(MalformedMessage(f"the body is unreadable: {error}"))

    def _recall(self, proxy: MessageProxy) -> None:
        earlier_run = self.ended.recall(proxy.options["redis_message_id"])
        if earlier_run is not None:
            proxy.earlier_run, proxy.redelivered = earlier_run, True  # type: ignore[attr-defined]

    @property
    def outstanding_message_count(self) -> int:
        """How many messages take a prefetch slot, as in Dramatiq's consumer."""
        return self.window.taken + len(self.cache)

    def _fetch(self) -> bool:
        """Fill the cache. Returns False if no message arrived for a while."""
        if self.orphans.are_due():
            self.call(self.losses.remember)
            self.call(self.orphans.requeue)
        self.call(self.recovery.recover_if_due)
        if left := self.breaker.seconds_left():
            self.idle(min(left, self.timeout_ms / 1_000))
            return False
        if self.is_quiet and not self.is_delay_queue:
            # Other workers take the rest. The delay queue's consumer goes on fetching, which is this process's heartbeat.
            self.idle(self.timeout_ms / 1_000)
            return False
        room = min(self.make_room(), IN_A_ROW) if self.breaker.is_pausing else self.make_room()
        if room > 0:
            self.window.about_to_fetch()
            taken = self.call(self._take_off, room)
            self.cache.extend(zip(taken[::3], taken[1::3], taken[2::3], strict=True))
            if self.cache:
                self.misses = 0
                return True
        if self.is_delay_queue or room > 0:
            self.misses, pause = compute_backoff(self.misses, max_backoff=self.timeout_ms)
            self.idle(pause / 1_000)
            return False
        # Every slot is taken, and the cache is empty.
        self.window.wait(self.timeout_ms / 1_000)
        return False

    def make_room(self) -> int:
        """Return how many messages may be fetched."""
        return self.window.prefetch - self.outstanding_message_count

    def _take_off(self, most: int) -> list[bytes]:
        broker = self.broker
        taken: list[bytes] = _FETCH.call(self.client, [broker.namespace], [broker.broker_id, self.source, most])
        return taken

    def ack(self, message: MessageProxy) -> None:
        redis_id = message.options["redis_message_id"]
        try:
            if "do_ack" in vars(self.broker):
                # An instrumentation or a test has replaced Dramatiq's method.
                self.call(self.broker.do_ack, self.source, redis_id)
            else:
                self._settle(message, redis_id)
        except BrokerConnectionError as error:
            self.window.job_finished(redis_id)
            if not self.state.stopping.is_set():
                raise
            self.report_unacked(message, error)
        self._release(message)

    def _settle(self, message: MessageProxy, redis_id: str) -> None:
        """Acknowledge a message without follow-up messages."""
        self.window.job_finished(redis_id)
        reply = self.settling.run(redis_id)
        if reply != SETTLED:
            self.losses.missing(self.source, redis_id)
        if reply == REASSIGNED:
            self._not_acked(message)

    def publish_follow_ups(self, message: MessageProxy, delivery: Delivery, dead: Message[Any] | bytes | None) -> None:
        redis_id = message.options["redis_message_id"]
        sends: list[str | bytes] = []
        for outgoing in delivery.outgoing:
            if outgoing.encoded is None:
                outgoing.encoded = self._encode(outgoing)
            sends.extend(outgoing.encoded)
        self.window.job_finished(redis_id)
        body = b"" if dead is None else dead if isinstance(dead, bytes) else self.encoded(dead)
        claim = claim_of(delivery) if self.settling.can_complete(delivery) else None
        reply = None if claim is None else self.settling.run_with_completion(redis_id, body, sends, claim)
        is_completed, keep_unacked = reply is not None, False
        if reply is None:
            # Two steps: `Claims.finish` completes the key between publish and acknowledgement.
            keep_unacked = delivery.completes_key()
            reply = self.settling.run(redis_id, body, sends, keep_unacked)
        if reply != SETTLED and not keep_unacked:
            self.losses.missing(self.source, redis_id)
        if reply == REASSIGNED:
            self._handle_reassigned(redis_id, delivery, dead is not None)
        if dead is not None and "do_nack" in vars(self.broker):
            # Replaced, as in `ack`. The dead letter is in its place already.
            self.call(self.broker.do_nack, self.source, redis_id)
        if is_completed:
            self.state.idempotency.claims.drop(claim)
            delivery.claim = None
        published, delivery.follow_ups = delivery.outgoing, None
        delivery.acked = not keep_unacked
        if reply != REASSIGNED:
            for outgoing in published:
                self.broker.emit_after("enqueue", outgoing.message, outgoing.delay)
        if not keep_unacked:
            self._release(message)

    def _handle_reassigned(self, redis_id: str, delivery: Delivery, dead: bool) -> None:
        """Handle a message no longer held by this process.

        Either another worker has the message and nothing was published, or an earlier call did everything and the reply was
        lost. If the message comes back here, the rest of this run is done then, and the job does not run.
        """
        decision = delivery.decision
        if decision is not None and not is_recorded_by_store(delivery):
            left = decision if dead or delivery.claim is not None else earlier_run_of(delivery).decision
            self.ended.remember(redis_id, EarlierRun(left, delivery.follow_ups))
        if delivery.claim is not None:
            raise DeliveryReassigned

    def _not_acked(self, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is not None and not is_recorded_by_store(delivery):
            self.ended.remember(message.options["redis_message_id"], earlier_run_of(delivery))

    def _encode(self, outgoing: OutgoingMessage) -> tuple[str, str, bytes]:
        """Return queue, id and body as ``RedisBroker.enqueue`` would send them. Runs the before-hooks of enqueue."""
        redis_id = str(uuid4())
        self.broker.declare_queue(outgoing.message.queue_name)
        outgoing.message = message = prepared(self.broker, outgoing.message, outgoing.delay, redis_message_id=redis_id)
        return message.queue_name, redis_id, self.encoded(message)

    def completes_with_publish(self, delivery: Delivery) -> bool:
        return self.settling.can_complete(delivery)

    def completion_command(self, delivery: Delivery) -> tuple[tuple[Any, ...], bool]:
        if not self.settling.can_complete(delivery):
            return super().completion_command(delivery)
        redis_id = delivery.message.options["redis_message_id"]
        self.window.job_finished(redis_id)
        return self.settling.command(redis_id, completes=claim_of(delivery)), True

    def acked_by_completion(self, delivery: Delivery, reply: object) -> None:
        super().acked_by_completion(delivery, reply)
        if reply == MISSING:
            self.losses.missing(self.source, delivery.message.options["redis_message_id"])
        self._release(delivery.message)

    def requeue(self, messages: list[MessageProxy]) -> None:
        ids = [message.options["redis_message_id"] for message in messages]
        if ids:
            self.call(self.broker.do_requeue, self.source, *ids)
            for redis_id in ids:
                self.window.release(redis_id)

    def abandon(self, message: MessageProxy) -> None:
        # The id stays in this process's unacked set: `Orphans` or another worker finds the id there.
        self._release(message)

    def return_to_queue(self, message: MessageProxy) -> None:
        self.abandon(message)

    def fault_of(self, error: Exception) -> Fault:
        return Fault.PERMANENT if isinstance(error, redis.DataError) else super().fault_of(error)

    def lost_connection(self, error: Exception) -> bool:
        lost = isinstance(error, redis.RedisError) and not isinstance(error, redis.DataError)
        return lost or super().lost_connection(error)

    def _release(self, message: MessageProxy | Message[Any]) -> None:
        self.window.release(message.options["redis_message_id"])

    def close(self) -> None:
        super().close()
        if self.state.stopping.is_set():
            self.cache.clear()
            try:
                # Prefetched messages not yet begun by a thread, and abandoned messages.
                self.orphans.requeue()
            except (redis.RedisError, OSError) as error:
                logger.warning(
                    "The worker could not requeue its messages of queue %r; another worker recovers them later: %s",
                    self.source,
                    error,
                )
