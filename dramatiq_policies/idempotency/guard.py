"""Decide whether a job may begin: make the key, claim the key, and otherwise skip, defer or quarantine the message.

The wrapper of ``actor.fn`` calls the guard, after the before-hooks of all middleware. The guard either puts the claim on the
delivery, or puts the decision on the delivery and raises SkipMessage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from dramatiq.results import ResultMissing

from ..common.clock import now_ms
from ..common.plurals import counted
from ..common.throttle import Throttle
from ..delivery.consumer import REDELIVERED
from ..delivery.decision import Decision
from ..delivery.delivery import Delivery
from ..delivery.executor import run_job
from ..delivery.history import POLICIES, History, run_of
from ..delivery.outgoing import OutgoingMessage
from ..errors import Crashed, UnknownRecord
from ..outcomes import Outcome, logger
from . import actions
from .claim import Claim, QuarantinedClaim
from .claims import Claims
from .contention import WAITS_FOR, Contention
from .duplicate_results import ResultsDown, forward_first_result
from .options import AlreadyDone, Register, crash_counter_name, key_of, register_of
from .store_client import StoreDown
from .tokens import is_dead

if TYPE_CHECKING:
    from dramatiq import Message

    from ..delivery.actor_policy import IdempotencyOptions
    from ..delivery.broker_state import BrokerState
    from ..delivery.executor import Proceed

__all__ = ["IdempotencyGuard"]

#: The answer to a claim of a key.
Answer = Claim | QuarantinedClaim | actions.Action
#: How often a job that must start alone is deferred because of other running jobs, before the job starts beside them.
_ALONE_AFTER = 10
#: Milliseconds after the completion of a transactional job in which its result may come. Later, its worker has died.
_RESULT_COMES_WITHIN = 10_000


class IdempotencyGuard:
    """Guard the jobs of one broker by their keys.

    Parameters:
      state: The state of the broker.
      claims: The claims on keys.
      run_without_store: Whether a job runs unguarded while the store is down; otherwise the message waits.
      scope: Separates this service's keys from other services in the store; None if the store's namespace does.
    """

    def __init__(
        self, state: BrokerState, claims: Claims, *, run_without_store: bool, scope: str | None = None
    ) -> None:
        self.state = state
        self.scope = scope
        self.claims = claims
        self.contention = Contention(claims.lease)
        self.run_without_store = run_without_store
        self._differing = Throttle()

    def register_of(self, actor_name: str, key: str) -> Register:
        """Return the register of an actor's key."""
        if self.scope is None:
            return register_of(actor_name, key)
        return register_of(actor_name, key, (self.scope, self.state.broker.get_actor(actor_name).queue_name))

    def around_job(self, delivery: Delivery, proceed: Proceed) -> Any:
        """Run a job once: wait for a job that runs alone, claim the key, and run the job if no other worker does."""
        policy = delivery.policy
        options = None if policy is None else policy.idempotency
        exclusive, batched = self.claims.exclusive, self.state.idempotency.batched_completions
        if batched is not None and not (
            options is not None and options.key_runs_no_user_code and not delivery.redelivered and exclusive.is_open
        ):
            # No claim follows at once that would carry the deferred completions.
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
        _, _, args, kwargs = delivery.job
        key_runner = options.key_runner
        if key_runner is None:
            delivery.key = key_of(delivery.message, options)
        else:
            # User code, so within the timeout.
            delivery.key = key_of(
                delivery.message, options, lambda make_key: run_job(delivery, (key_runner, make_key, args, kwargs))
            )
        # Reset: only the key's callable has run, not the job.
        delivery.started = delivery.ended = None
        if delivery.key is not None or delivery.redelivered:
            # Outside the timeout: an interrupt would break the store's client.
            self.admit(delivery, options, delivery.key)
        if options.job_with_done_when is None or options.job_runner is None:
            return proceed(delivery)
        delivery.job = (options.job_runner, options.job_with_done_when, args, kwargs)
        try:
            return proceed(delivery)
        except AlreadyDone:
            delivery.started = None
            self.done(delivery)
            raise

    def admit(self, delivery: Delivery, options: IdempotencyOptions, key: str | None) -> None:
        """Claim the key. For a redelivered message without a key, count the start.

        Raises:
          SkipMessage: The job must not run now; the decision is on the delivery.
        """
        message = delivery.message
        if delivery.redelivered and (left := self.state.idempotency.booting_until - time.monotonic()) > 0:
            time.sleep(left)
        earlier = None
        if key is None:
            if not delivery.redelivered or options.max_crashes is None:
                return
            # A redelivery implies an uncounted start: begin at 2. The cap always allows at least one more start.
            name, starts = crash_counter_name(message.message_id), min(2, options.max_crashes)
        else:
            name, earlier = self.register_of(message.actor_name, key)
            starts = 1
        args = "" if key is None or options.fingerprint is None else options.fingerprint(message.args, message.kwargs)
        run = run_of(message.options)
        two_steps = not delivery.transport.acks_with_follow_ups
        request = actions.Request(
            message.message_id, run, is_dead, options.max_crashes, starts, args=args, ends_are_recorded=two_steps
        )
        ask_store = partial(self.claims.claim, name, keyed=key is not None, retention=options.ttl, earlier=earlier)
        try:
            answer = self._claim(delivery, name, request, ask_store)
        except UnknownRecord as error:
            logger.error("Message %s of actor %s is deferred: %s", message.message_id, message.actor_name, error)
            self.defer(delivery, "store_down")
        except StoreDown:
            self._admit_without_store(delivery, keyed=key is not None)
        else:
            self._act_on(delivery, name, answer)

    def _admit_without_store(self, delivery: Delivery, *, keyed: bool) -> None:
        """Let a job run without a claim, if nobody relies on the claim.

        Raises:
          SkipMessage: The message waits for the store.
        """
        if not keyed:
            return
        message = delivery.message
        if not self.run_without_store or (delivery.policy is not None and delivery.policy.transactional):
            self.defer(delivery, "store_down")
        logger.warning(
            "Message %s of actor %s runs without a claim, because the idempotency store is down: a message with the same key may "
            "run too.",
            message.message_id,
            message.actor_name,
        )

    def _claim(
        self, delivery: Delivery, name: str, request: actions.Request, ask_store: Callable[[actions.Request], Answer]
    ) -> Answer:
        """Claim a register. For a contended key, return a recent answer of the store to another message.

        Raises:
          SkipMessage: The job must start alone, but other jobs run. The message is deferred.
        """
        is_counted = delivery.message.options.pop(WAITS_FOR, None) == name
        if name in self.contention.keys and not delivery.redelivered:
            known = self.contention.known(name, delivery.message.message_id)
            if known is not None:
                if not is_counted:
                    self.contention.count(name)
                return known
        answer = ask_store(request)
        if isinstance(answer, actions.Start):
            # The last allowed start: claim again, while no other job runs.
            answer = ask_store(self._alone(delivery, request, answer.starts))
        if isinstance(answer, actions.WaitForOwner) or name in self.contention.keys:
            self.contention.observe(name, answer, counted=is_counted)
        return answer

    def _act_on(self, delivery: Delivery, name: str, answer: Answer) -> None:
        """Put the claim on the delivery. Any other answer ends the delivery.

        Raises:
          SkipMessage: The job must not run now; the decision is on the delivery.
        """
        match answer:
            case Claim():
                delivery.claim = answer
                if self.claims.stopping:
                    # The shutdown uncounted the running jobs before this job was among them.
                    self.claims.uncount_start(delivery)
            case QuarantinedClaim():
                self._quarantine(delivery, answer)
            case actions.WaitForOwner():
                if answer.differs and not History(delivery.message.options).deferrals:
                    self._warn_of_other_arguments(delivery.message, answer.message_id)
                self.defer(delivery, "running", name, answer)
            case actions.RepublishRetry():
                self._republish(delivery, answer.retry)
            case _:
                # Any other answer must not let the job run without a claim.
                assert isinstance(answer, actions.SkipDuplicate)
                self._skip(delivery, answer)

    def _alone(self, delivery: Delivery, request: actions.Request, starts: int) -> actions.Request:
        """Return the request of a job that must start alone. While other jobs run in this process, defer the message.

        After ten deferrals (ten more for each start that proved nothing) the job starts beside the others, because they may
        never end. A crash of such a start proves nothing.

        Raises:
          SkipMessage: The message is deferred.
        """
        unproven = max(0, starts - (request.max_crashes or starts))
        if self.claims.exclusive.make_alone(delivery, unproven):
            return request._replace(alone=True)
        if History(delivery.message.options).deferrals < _ALONE_AFTER * (unproven + 1):
            self.defer(delivery, "running")
        return request._replace(beside=True)

    def _quarantine(self, delivery: Delivery, found: QuarantinedClaim) -> NoReturn:
        delivery.claim = found.claim
        error = Crashed(
            f"the job started {counted(found.starts, 'time')} and never finished: each time its worker "
            "crashed or was killed"
        )
        delivery.skip(Decision(Outcome.DEAD, "crashed", exception=error, dead_letter=True))

    def _republish(self, delivery: Delivery, retry: dict[str, Any]) -> NoReturn:
        again = delivery.next_message(**retry.get("options", {}))
        due = retry.get("due")
        delivery.add_follow_up(OutgoingMessage(again, None if due is None else max(1, due - now_ms())))
        delivery.skip(Decision(Outcome.DUPLICATE, "stale"))

    def _skip(self, delivery: Delivery, duplicate: actions.SkipDuplicate) -> NoReturn:
        if duplicate.first_message_id is not None:
            if duplicate.differs:
                self._warn_of_other_arguments(delivery.message, duplicate.first_message_id)
            policy = delivery.policy
            # A transactional job stores its result after the completion of its key.
            may_come = (
                policy is not None
                and policy.transactional
                and policy.idempotency is not None
                # Negative if the actor's ttl was longer before.
                and 0 <= policy.idempotency.ttl - duplicate.left < _RESULT_COMES_WITHIN
            )
            self._forward_first_result(delivery, duplicate.first_message_id, may_come=may_come)
        delivery.skip(Decision(Outcome.DUPLICATE, duplicate.reason))

    def _warn_of_other_arguments(self, message: Message[Any], first_message_id: str) -> None:
        """Log a duplicate with other arguments, once per message: a deferred one comes back."""
        if not self._differing.admits(message.message_id, math.inf):
            return
        logger.warning(
            "Message %s of actor %s has the idempotency key of message %s, but other arguments. It counts as a duplicate. If both "
            "jobs must run, add the arguments that tell them apart to idempotency_key.",
            message.message_id,
            message.actor_name,
            first_message_id,
        )

    def done(self, delivery: Delivery) -> None:
        """After ``done_when`` returned True, move on pipeline and group as if the job had just succeeded."""
        self._forward_first_result(delivery, delivery.message.message_id)
        delivery.decision = Decision(Outcome.DUPLICATE, "done")
        delivery.message.options["store_results"] = False

    def _forward_first_result(self, delivery: Delivery, first_message_id: str, *, may_come: bool = False) -> None:
        try:
            forward_first_result(self.state.broker, delivery, first_message_id, may_come=may_come)
        except ResultsDown:
            self.defer(delivery, "store_down")
        except ResultMissing:
            self.defer(delivery, "running")

    def defer(
        self, delivery: Delivery, reason: str, name: str = "", answer: actions.WaitForOwner | None = None
    ) -> NoReturn:
        """Enqueue the message again, without an attempt.

        Parameters:
          reason: Why, for the outcome.
          name: The register with a running owner; empty without one.
          answer: The store's answer about the owner.

        Raises:
          SkipMessage: Always; the decision is on the delivery.
        """
        message = delivery.message
        history = History(message.options)
        wait = self.contention.wait(name, history.deferrals, answer)
        history.deferrals += 1
        again = delivery.next_message(**{POLICIES: history.option()})
        if delivery.redelivered:
            # Keep the mark: without a key, only redelivered messages count their starts.
            again.options[REDELIVERED] = True
        if name:
            again.options[WAITS_FOR] = name
        delivery.add_follow_up(OutgoingMessage(again, wait))
        delivery.skip(Decision(Outcome.DEFERRED, reason, delay_ms=wait))
