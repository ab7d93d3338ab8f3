"""The transport on Redis.

A single script publishes the follow-up messages and acknowledges, so no crash or lost reply falls between the two. A message's
id is the id under which Redis stores the body; an id inside the body is ignored. The transport knows every id in hand. If Redis
assigns further ids to this process, a reply was lost, and the transport requeues those messages. Any error of Redis counts
as a lost connection, except permanent errors (see `calls`).
"""

from __future__ import annotations

from collections import deque
from importlib import resources
from time import monotonic
from typing import Any
from uuid import uuid4

import redis
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import compute_backoff
from dramatiq.errors import BrokerConnectionError

from ... import _dramatiq
from ..._redis import RAW, CommandBatcher, Script
from ...common.plurals import counted
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
from ..ended_runs import EndedRuns, is_keyed, rest_of
from .calls import RedisCalls
from .data_loss import DataLoss
from .prefetch import InFlight, PrefetchWindow
from .recovery import Recovery
from .settle_script import MISSING, SettleScript

__all__ = ["RedisTransport"]

logger = SafeLogger("dramatiq_policies.outcomes")

_FETCH = Script(resources.files(__package__).joinpath("fetch.lua").read_text())
#: Seconds between two looks for messages lost with a reply. A loss may raise no error: if the client repeats the fetch by
#: itself, the second reply holds other messages.
_CHECK_EVERY = 5.0


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
        self.misses = 0
        #: Time of the last look for lost messages. The start value makes the first fetch look.
        self.last_check = -_CHECK_EVERY

    def take(self) -> MessageProxy | None:
        while True:
            if not self.cache and not self._fetch():
                return None
            name, data, recovered = self.cache.popleft()
            message = self._read(name, data, recovered)
            # If the id is in hand already, the message was enqueued twice, or requeued and fetched again. Run it once.
            if message is not None and self.window.take(message.options["redis_message_id"]):
                proxy = MessageProxy(message)
                if not self.is_delay_queue:
                    _dramatiq.cache_fields(proxy, message, data)
                    if self.ended.known:
                        self._recall(proxy)
                return proxy

    def _recall(self, proxy: MessageProxy) -> None:
        earlier_run = self.ended.recall(proxy.options["redis_message_id"])
        if earlier_run is not None:
            proxy.earlier_run, proxy.redelivered = earlier_run, True  # type: ignore[attr-defined]

    def _read(self, name: bytes, data: bytes, recovered: bytes = b"") -> Message[Any] | None:
        """Decode the message stored under an id. Returns None if the body went to the dead-letter queue."""
        try:
            redis_id = name.decode()
            message = self.decode(data)
            if type(message.options.get("redis_message_id", "")) is not str:
                raise MalformedMessage("redis_message_id is not a string")
        except Exception as error:
            unreadable = MalformedMessage(f"the body is unreadable: {error}")
            if self.breaker.unreadable(error):
                # The body stays on the queue, behind the rest.
                self.call(self.broker.do_requeue, self.source, name)
                return None
            self.call(self.broker.do_nack, self.source, name)
            self.report_malformed(unreadable)
            return None
        if self.breaker.count:
            self.breaker.readable()
        # The body may contain another message's id, or an id that can't be encoded.
        message.options["redis_message_id"] = redis_id
        if recovered:
            if FAILURE in message.options:
                # A dead letter that a worker of 0.1.0 had no time to move.
                self.call(self.broker.do_nack, self.source, name)
                return None
            message.options[REDELIVERED] = True
        return message

    @property
    def outstanding_message_count(self) -> int:
        """How many messages take a prefetch slot, as in Dramatiq's consumer."""
        return self.window.taken + len(self.cache)

    def _fetch(self) -> bool:
        """Fill the cache. Returns False if no message arrived for a while."""
        if monotonic() - self.last_check > _CHECK_EVERY:
            self.call(self.losses.remember)
            self.call(self._requeue_orphans)
            self.last_check = monotonic()
        self.call(self.recovery.recover_if_due)
        if left := self.breaker.seconds_left():
            self.idle(min(left, self.timeout_ms / 1_000))
            return False
        room = min(self.room(), IN_A_ROW) if self.breaker.is_pausing else self.room()
        if self.is_quiet and not self.is_delay_queue:
            # Other workers take the rest. The delay queue's consumer goes on fetching, which is this process's heartbeat.
            self.idle(self.timeout_ms / 1_000)
            return False
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

    def room(self) -> int:
        """How many messages may be fetched."""
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
            elif (settled := self.settling.run(self._mark_finished(message))) != 1:
                self.losses.missing(self.source, redis_id)
                if not settled:
                    self._not_acked(message)
        except BrokerConnectionError as error:
            self.window.job_finished(redis_id)
            if not self.state.stopping.is_set():
                raise
            logger.warning(
                "Message %s of actor %s could not be acknowledged and will be redelivered: %s",
                message.message_id,
                message.actor_name,
                error,
            )
        self._release(message)

    def publish_follow_ups(self, message: MessageProxy, delivery: Delivery, dead: Message[Any] | bytes | None) -> None:
        sends: list[str | bytes] = []
        for follow_up in delivery.follow_ups or ():
            assert isinstance(follow_up, OutgoingMessage)
            if follow_up.encoded is None:
                follow_up.encoded = self._encode(follow_up)
            sends.extend(follow_up.encoded)
        redis_id = self._mark_finished(message)
        body = b"" if dead is None else dead if isinstance(dead, bytes) else self.encoded(dead)
        claim, keep_unacked = claim_of(delivery) if self.settling.can_complete(delivery) else None, False
        settled = None if claim is None else self.settling.run_with_completion(redis_id, body, sends, claim)
        if settled is None:
            # Two steps: the key is completed between publish and acknowledgement.
            claim, keep_unacked = None, delivery.completes_key()
            settled = self.settling.run(redis_id, body, sends, keep_unacked)
        if settled != 1 and not keep_unacked:
            self.losses.missing(self.source, redis_id)
        if not settled:
            self._handle_reassigned(redis_id, delivery, dead is not None)
        if dead is not None and "do_nack" in vars(self.broker):
            # Replaced, as in `ack`. The dead letter is in its place already.
            self.call(self.broker.do_nack, self.source, redis_id)
        if claim is not None:
            self.state.idempotency.claims.drop(claim)
            delivery.claim = None
        published, delivery.follow_ups = delivery.follow_ups, None
        delivery.acked = not keep_unacked
        for follow_up in (published or ()) if settled else ():
            assert isinstance(follow_up, OutgoingMessage)
            self.broker.emit_after("enqueue", follow_up.message, follow_up.delay)
        if not keep_unacked:
            self._release(message)

    def _handle_reassigned(self, redis_id: str, delivery: Delivery, dead: bool) -> None:
        """Handle a message no longer held by this process.

        Either another worker has the message and nothing was published, or an earlier call did everything and the reply was
        lost. If the message comes back here, the rest of this run is done then, and the job does not run.
        """
        decision = delivery.decision
        if decision is not None and not is_keyed(delivery):
            left = decision if dead or delivery.claim is not None else rest_of(delivery).decision
            self.ended.remember(redis_id, EarlierRun(left, delivery.follow_ups))
        if delivery.claim is not None:
            raise DeliveryReassigned

    def _not_acked(self, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is not None and not is_keyed(delivery):
            self.ended.remember(message.options["redis_message_id"], rest_of(delivery))

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
        return self.settling.command(self._mark_finished(delivery.message), completes=claim_of(delivery)), True

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
        # The id stays in this process's unacked set: `_requeue_orphans` or another worker finds the id there.
        self._release(message)

    def return_to_queue(self, message: MessageProxy) -> None:
        self.abandon(message)

    def fault_of(self, error: Exception) -> Fault:
        return Fault.PERMANENT if isinstance(error, redis.DataError) else super().fault_of(error)

    def lost_connection(self, error: Exception) -> bool:
        lost = isinstance(error, redis.RedisError) and not isinstance(error, redis.DataError)
        return lost or super().lost_connection(error)

    def _mark_finished(self, message: MessageProxy | Message[Any]) -> str:
        redis_id: str = message.options["redis_message_id"]
        self.window.job_finished(redis_id)
        return redis_id

    def _release(self, message: MessageProxy | Message[Any]) -> None:
        self.window.release(message.options["redis_message_id"])

    def _requeue_orphans(self) -> None:
        """Requeue messages delivered to this process in a lost reply."""
        broker = self.broker
        unacked = f"{broker.namespace}:__acks__.{broker.broker_id}.{self.source}"
        # Read before and after: a message acknowledged in between is not lost.
        held = frozenset(self.window.held)
        names = self.client.execute_command("SMEMBERS", unacked, **RAW)
        held |= self.window.held
        lost = [name for name in names if name.decode(errors="replace") not in held]
        if lost:
            log = logger.info if self.state.stopping.is_set() else logger.warning
            log(
                "Requeued %s of queue %r that Redis lists for this worker and no thread holds.",
                counted(len(lost), "message"),
                self.source,
            )
            broker.do_requeue(self.source, *lost)

    def close(self) -> None:
        super().close()
        if self.state.stopping.is_set():
            self.cache.clear()
            try:
                # Prefetched messages not yet begun by a thread, and abandoned messages.
                self._requeue_orphans()
            except (redis.RedisError, OSError) as error:
                logger.warning(
                    "The worker could not requeue its messages of queue %r; another worker recovers them later: %s",
                    self.source,
                    error,
                )
