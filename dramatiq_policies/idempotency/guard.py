"""Whether a job may begin: its key, its claim, and what becomes of the message if not.

Called by the wrapper of ``actor.fn``, after every other middleware's before-hook. It either returns, with the claim on the
delivery, or raises SkipMessage with the decision on it.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from dramatiq.broker import MessageProxy
from dramatiq.middleware import GroupCallbacks, Pipelines
from dramatiq.results import ResultFailure, ResultMissing, Results

from ..delivery.consumer import REDELIVERED
from ..delivery.decision import Decision
from ..delivery.delivery import Delivery, OutgoingMessage
from ..delivery.executor import run_interruptibly
from ..delivery.history import POLICIES, History, now_ms, run_of
from ..errors import Crashed, NoResult, UnknownRecord
from ..outcomes import Outcome, logger
from . import records
from .claims import Claim, Claims, Quarantined, StoreDown, crash_counter_name, is_dead
from .contention import WAITS_FOR, Contention
from .options import AlreadyDone, Register, key_of, register_of

if TYPE_CHECKING:
    from dramatiq import Message

    from ..delivery.actor_policy import IdempotencyOptions
    from ..delivery.broker_state import BrokerState
    from ..delivery.executor import Proceed

__all__ = ["IdempotencyGuard"]

#: How often a job that must start alone is put back, where others run, before it starts beside them.
_RETURNS = 10


class IdempotencyGuard:
    """Lets the jobs of one broker begin.

    Parameters:
      claims: Where keys are claimed.
      place: Tells this broker's messages from those of other services in the store; None where the namespace does.
      run_without_store: Whether a job runs unguarded while the store is down; otherwise its message waits.
    """

    def __init__(
        self, state: BrokerState, claims: Claims, *, run_without_store: bool, place: str | None = None
    ) -> None:
        self.state = state
        self.place = place
        self.claims = claims
        self.contention = Contention(claims.lease)
        self.run_without_store = run_without_store

    def register_of(self, actor_name: str, key: str) -> Register:
        """Where a key of an actor is remembered."""
        if self.place is None:
            return register_of(actor_name, key)
        return register_of(actor_name, key, (self.place, self.state.broker.get_actor(actor_name).queue_name))

    def around_job(self, delivery: Delivery, proceed: Proceed) -> Any:
        """Run a job once: claim its key, run it if nobody else does, and keep it from jobs that must run alone."""
        policy = delivery.policy
        options = None if policy is None else policy.guard
        exclusive, batched = self.claims.exclusive, self.state.batched_completions
        if batched is not None and not (
            options is not None and options.key_runs_no_user_code and not delivery.redelivered and exclusive.is_open
        ):
            batched.flush()
        if options is None:
            return proceed(delivery)
        exclusive.enter(delivery)
        try:
            if options.enabled or delivery.redelivered or "idempotency_key" in delivery.message.options:
                return self._run_once(delivery, options, proceed)
            return proceed(delivery)
        finally:
            exclusive.leave(delivery)

    def _run_once(self, delivery: Delivery, options: IdempotencyOptions, proceed: Proceed) -> Any:
        job = delivery.job
        if options.call_key is None:
            delivery.key = key_of(delivery.message, options)
        else:
            # The user's code, so inside of the timeout.
            make = partial(run_interruptibly, delivery, options.call_key, args=job.args, kwargs=job.kwargs)
            delivery.key = key_of(delivery.message, options, make)
        # The key's function was not the job.
        delivery.started = delivery.ended = None
        if delivery.key is not None or delivery.redelivered:
            # Outside of any interrupt, which would strike in the store's client.
            self.admit(delivery, options, delivery.key)
        if options.job is None or options.call is None:
            return proceed(delivery)
        delivery.job = job._replace(call=options.call, fn=options.job)
        try:
            return proceed(delivery)
        except AlreadyDone:
            delivery.started = None
            self.done(delivery)
            raise

    def admit(self, delivery: Delivery, guard: IdempotencyOptions, key: str | None) -> None:
        """Claim the key, or count a start.

        Raises:
          SkipMessage: The job is not to run now; the decision is on the delivery.
        """
        message = delivery.message
        if delivery.redelivered and (left := self.state.booting_until - time.monotonic()) > 0:
            time.sleep(left)
        earlier = None
        if key is None:
            if not delivery.redelivered or guard.max_crashes is None:
                return
            # The start that was not counted is the first, if there was one: a single start is never refused for it.
            name, starts = crash_counter_name(message.message_id), min(2, guard.max_crashes)
        else:
            name, earlier = self.register_of(message.actor_name, key)
            starts = 1
        try:
            answer = self._ask(delivery, guard, name, starts, keyed=key is not None, earlier=earlier)
        except UnknownRecord as error:
            logger.error("Message %s of actor %s waits: %s", message.message_id, message.actor_name, error)
            self._defer(delivery, "store_down")
        except StoreDown:
            if key is None:
                return
            if not self.run_without_store:
                self._defer(delivery, "store_down")
            logger.warning(
                "Message %s of actor %s runs without a claim: the idempotency store is down.",
                message.message_id,
                message.actor_name,
            )
            return
        if isinstance(answer, Claim):
            delivery.claim = answer
            if self.claims.stopping:
                # The shutdown looked for the jobs that run before this one could be seen.
                self.claims.uncount_start(delivery)
        elif isinstance(answer, records.WaitForOwner):
            self._defer(delivery, "running", name, answer)
        else:
            self._refuse(delivery, answer)

    def _ask(
        self, delivery: Delivery, guard: IdempotencyOptions, name: str, starts: int, *, keyed: bool, earlier: str | None
    ) -> Claim | Quarantined | records.Action:
        """Claim a register, or what becomes of the message instead."""
        message = delivery.message
        counted = message.options.pop(WAITS_FOR, None) == name
        if name in self.contention.keys and not delivery.redelivered:
            known = self.contention.known(name, message.message_id)
            if known is not None:
                if not counted:
                    self.contention.count(name)
                return known
        request = records.Request(message.message_id, run_of(message.options), is_dead, guard.max_crashes, starts)
        answer = self.claims.claim(name, request, keyed=keyed, keep=guard.ttl, earlier=earlier)
        if isinstance(answer, records.Start):
            request = self._alone(delivery, request, answer.starts)
            answer = self.claims.claim(name, request, keyed=keyed, keep=guard.ttl, earlier=earlier)
        if isinstance(answer, records.WaitForOwner) or name in self.contention.keys:
            self.contention.observe(name, answer, counted=counted)
        return answer

    def _alone(self, delivery: Delivery, request: records.Request, starts: int) -> records.Request:
        """The request of a job that is to start while nothing else runs in this process; it is put back if others do.

        After ten returns it starts beside others: they may never end. Such a start proves nothing.
        """
        unproven = max(0, starts - (request.max_crashes or starts))
        if self.claims.exclusive.make_alone(delivery, unproven):
            return request._replace(alone=True)
        if History(delivery.message.options).deferrals < _RETURNS * (unproven + 1):
            self._defer(delivery, "running")
        return request._replace(beside=True)

    def _refuse(self, delivery: Delivery, answer: records.Action | Quarantined) -> None:
        if isinstance(answer, Quarantined):
            delivery.claim = answer.claim
            error = Crashed(
                f"began {answer.starts} times and never ended: its worker was killed, or crashed, each time"
            )
            delivery.skip(Decision(Outcome.DEAD, "crashed", exception=error, dead_letter=True))
        if isinstance(answer, records.RepublishRetry):
            follow = answer.follow
            again = delivery.again(**follow.get("options", {}))
            due = follow.get("due")
            delivery.add_to_outbox(OutgoingMessage(again, None if due is None else max(1, due - now_ms())))
            delivery.skip(Decision(Outcome.DUPLICATE, "stale"))
        assert isinstance(answer, records.SkipDuplicate)
        if answer.twin is not None:
            self.forward_first_result(delivery, answer.twin)
        delivery.skip(Decision(Outcome.DUPLICATE, answer.reason))

    def done(self, delivery: Delivery) -> None:
        """``done_when`` said so: settle this message's place, as if its job had just succeeded."""
        self.forward_first_result(delivery, delivery.message.message_id)
        delivery.decision = Decision(Outcome.DUPLICATE, "done")
        delivery.message.options["store_results"] = False

    def forward_first_result(self, delivery: Delivery, twin: str) -> None:
        """Move on this message's pipeline and its group, with the result of the one that did its work.

        Raises:
          SkipMessage: That can't be done now, or never.
        """
        message, broker = delivery.message, self.state.broker
        options = message.options
        target = options.get("pipe_target")
        results = next((m for m in broker.middleware if isinstance(m, Results)), None)
        result, found, missed = None, False, False
        if results is not None:
            stored, ttl = results._lookup_options(broker, message)  # noqa: SLF001
            if stored:
                origin = message.copy(message_id=twin)
                try:
                    result, found = results.backend.get_result(origin), True
                    if twin != message.message_id:
                        results.backend.store_result(message, result, ttl)
                except ResultMissing:
                    missed = True
                except ResultFailure:
                    pass
                except Exception as error:
                    logger.warning("The result of message %s can't be read now: %s", twin, error)
                    self._defer(delivery, "store_down")
        if target is not None and not found and not self._ignores_result(target, message.actor_name):
            missing = NoResult(f"the next stage needs the result of message {twin}, which is not stored")
            delivery.skip(Decision(Outcome.DEAD, "no_result", exception=missing, dead_letter=True))
        if missed:
            _settle_result(results, message, twin, ttl)
        proxy: Any = MessageProxy(message)
        proxy.delivery = delivery
        movers: list[Any] = [m for m in broker.middleware if isinstance(m, (Pipelines, GroupCallbacks))]
        for middleware in movers:
            middleware.after_process_message(broker, proxy, result=result)

    def _ignores_result(self, target: Any, actor_name: str) -> bool:
        actor = self.state.broker.actors.get(actor_name)
        return bool(
            target.get("options", {}).get("pipe_ignore") or (actor is not None and actor.options.get("pipe_ignore"))
        )

    def _defer(
        self, delivery: Delivery, reason: str, name: str = "", answer: records.WaitForOwner | None = None
    ) -> None:
        message = delivery.message
        history = History(message.options)
        wait = self.contention.wait(name, history.deferrals, answer)
        history.deferrals += 1
        again = delivery.again(**{POLICIES: history.option()})
        if delivery.redelivered:
            # Still what counts a start of a message without a key.
            again.options[REDELIVERED] = True
        if name:
            again.options[WAITS_FOR] = name
        delivery.add_to_outbox(OutgoingMessage(again, wait))
        delivery.skip(Decision(Outcome.DEFERRED, reason, delay_ms=wait))


def _settle_result(results: Any, message: Message[Any], twin: str, ttl: int) -> None:
    """Tell whoever waits for a skipped message's result that there is none, for none will come."""
    try:
        if twin == message.message_id:
            # Nobody ran it: as stock stores for what is skipped.
            results.backend.store_result(message, None, ttl)
        else:
            error = NoResult(f"duplicate: the result of message {twin} is not stored")
            results.backend.store_exception(message, error, ttl)
    except Exception:
        logger.warning("The result of message %s can't be settled.", message.message_id, exc_info=True)
