"""Jobs with ``transactional=True``: the effects, the completion of the key and the follow-up messages in one transaction.

The order of a run::

    claim the key                                   committed at once, in the store's own connection
    begin; the job; INSERT the follow-up messages
    UPDATE the key: claimed by this run → completed
    COMMIT
    publish the follow-up messages; store the result; acknowledge

Failures that may happen between any two lines:

- The process dies before the COMMIT. The database rolls back. A redelivery takes over the claim and runs the job.
- The process dies after the COMMIT. A redelivery finds the key completed and skips the job; the relay publishes the rows.
- The process stands still until another run has taken over the claim. The UPDATE finds other bytes: the run rolls back and ends
  as a duplicate. A takeover during the UPDATE waits for the row's lock, and then finds the key completed.
- The reply to the COMMIT is lost, or a listener of the application fails after the COMMIT. The register tells whether the COMMIT
  took effect. If the database can't be reached, or the COMMIT still runs and locks the register, the message is deferred, and its
  next delivery finds out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from ..common.callables import unwrapped
from ..common.safe_logger import SafeLogger
from ..delivery.decision import Decision
from ..delivery.delivery import JobTransaction
from ..delivery.outgoing import OutgoingMessage
from ..errors import ConfigurationError
from ..idempotency.claim import claim_of
from ..idempotency.store_client import StoreDown
from ..interrupts import coroutines
from ..middleware.composition import Callbacks, CountMember, GroupCallbacks, Pipelines
from ..middleware.idempotency import guard_on
from ..outcomes import Outcome, text_of
from .database import is_transient
from .interrupts import watch_interrupts
from .key_records import is_record_of, message_id_of
from .key_table import KeyTable

if TYPE_CHECKING:
    from dramatiq import Actor

    from ..delivery.actor_policy import IdempotencyOptions
    from ..delivery.broker_state import BrokerState
    from ..delivery.delivery import Delivery
    from ..delivery.executor import Proceed
    from ..idempotency.claim import Claim
    from ..idempotency.claims import Claims
    from ..idempotency.guard import IdempotencyGuard
    from .database import Connection
    from .outbox import Outbox, Scope
    from .unit_of_work import UnitOfWorkFactory

__all__ = ["TransactionalJobs"]

logger = SafeLogger("dramatiq_policies.outcomes")

#: A renewal or a rewrite of the claim may come between two statements of the completion.
_TRIES = 5
#: When a message comes again whose key another message has taken over, in milliseconds.
_AGAIN_MS = 1_000


class TakenOver(Exception):
    """The key does not belong to this run any more. The argument is the content of the register."""


class TransactionalJobs:
    """The transactional actors of one broker.

    Parameters:
      state: The state of the broker.
      outbox: The outbox of the broker.
      factory: Makes the units of work.
    """

    def __init__(self, state: BrokerState, outbox: Outbox, factory: UnitOfWorkFactory) -> None:
        self.state = state
        self.outbox = outbox
        self._factory = factory
        self._store: KeyTable

    def add(self, where: str, actor: Actor[..., Any], options: IdempotencyOptions | None) -> None:
        """Run the jobs of an actor with ``transactional=True`` in transactions.

        Raises:
          ConfigurationError: The actor has no key, or the keys are not in the outbox's database.
        """
        store = None if options is None else self._claims().store
        if not isinstance(store, KeyTable):
            found = "no Idempotency with a store" if store is None else f"a {type(store).__name__}"
            raise ConfigurationError(
                f"{where}: transactional=True needs the idempotency keys in the outbox's database, and the broker has {found}. "
                "Call install(broker, outbox=SqlOutbox(engine), idempotency=Idempotency(SqlStore(engine))), or with Django "
                "DjangoOutbox() and DjangoStore()."
            )
        if options is None or not options.keyed:
            raise ConfigurationError(
                f"{where}: transactional=True needs a key. Add idempotent=True, or an idempotency_key."
            )
        self._factory.check(where, store, is_async=coroutines.is_async(_function_of(actor)))
        self._store = store
        # Within the claim of the key.
        self.state.add_around_job(self.around_job, order=3)

    def around_job(self, delivery: Delivery, proceed: Proceed) -> Any:
        """Run a transactional job and commit. Any other job just runs."""
        if delivery.policy is None or not delivery.policy.transactional:
            return proceed(delivery)
        claim = claim_of(delivery)
        assert claim is not None  # Without a claim the message was deferred.
        unit = self._factory.make(is_async=coroutines.is_async(delivery.job[1]))
        delivery.transaction = JobTransaction(unit.session)
        interrupts = watch_interrupts(delivery)
        try:
            result = unit.run(delivery, proceed)
            interrupts.raise_swallowed()
            claim.over = claim.committing = True
            unit.commit(partial(self._finish, delivery, claim, result))
        except TakenOver as taken:
            unit.roll_back(interrupted=False)
            self._give_way(delivery, claim, taken.args[0])
        except BaseException as error:
            unit.roll_back(interrupted=interrupts.seen)
            if not claim.committing:
                self._check_claim(delivery, claim)
                raise
            if not self._took_effect(delivery, claim, error):
                raise
            logger.warning(
                "The COMMIT of message %s took effect, although an error followed (%s: %s). The job has succeeded.",
                claim.record.message_id,
                type(error).__name__,
                text_of(error),
            )
        delivery.transaction.is_committed = True
        self._drop(delivery, claim)
        return result

    def _finish(self, delivery: Delivery, claim: Claim, result: Any, connection: Connection, scope: Scope) -> None:
        """Write the follow-up messages and the completion of the key in the job's transaction.

        Raises:
          TakenOver: Another run has taken over the key.
        """
        for step in self._follow_ups(delivery, result):
            if isinstance(step, CountMember):
                self.outbox.add_member(scope, delivery.message)
                continue
            for send in [step] if isinstance(step, OutgoingMessage) else step():
                self.outbox.add(scope, send.message, send.delay)
        # Last, because it locks the register until the COMMIT.
        self._complete(connection, claim)

    def _follow_ups(self, delivery: Delivery, result: Any) -> list[Any]:
        """Return the follow-up messages that the hooks of a success leave: the pipeline's next step, the group, ``on_success``.

        After the commit the worker runs these hooks again. They leave nothing then: see `Delivery.is_committed`.
        """
        broker, proxy = self.state.broker, delivery.proxy
        assert proxy is not None  # From the before-hooks to the after-hooks.
        try:
            for middleware in reversed(broker.middleware):
                if isinstance(middleware, (Pipelines, GroupCallbacks, Callbacks)):
                    middleware.after_process_message(broker, proxy, result=result)
            return delivery.follow_ups or []
        finally:
            # If the run fails now, others follow.
            delivery.follow_ups = None

    def _complete(self, connection: Connection, claim: Claim) -> None:
        store = self._store
        completed, retention, *_ = self._claims().completion(claim)
        expected: bytes | None = claim.value
        for _ in range(_TRIES):
            if store.swap_within(connection, claim.name, expected, completed, retention):
                return
            expected = store.get_within(connection, claim.name).value
            if expected is not None and not is_record_of(claim, expected):
                break
            # Forgotten by a user; or a rewrite of this run's record whose reply was lost.
        raise TakenOver(expected)

    def _check_claim(self, delivery: Delivery, claim: Claim) -> None:
        """Check that a failed run still has its key. After a stop of the process another run may have done the job.

        Raises:
          SkipMessage: Another run has taken over the key.
        """
        try:
            found = self._swap_with_itself(claim)
        except StoreDown:
            return
        if found is not None and not is_record_of(claim, found):
            self._give_way(delivery, claim, found)

    def _swap_with_itself(self, claim: Claim) -> bytes | None:
        """Return the content of the register of a claim.

        No read: a COMMIT may go on after its connection is lost, and a swap waits for its lock.

        Raises:
          StoreDown: The store is down.
        """
        claims = self._claims()
        swap = partial(claims.store.swap, claim.name, claim.value, claim.value, claims.lease + claim.retention)
        entry = claims.call_store(swap)
        return claim.value if entry is None else entry.value

    def _took_effect(self, delivery: Delivery, claim: Claim, error: BaseException) -> bool:
        """Whether the commit of a run took effect, although an error followed.

        Raises:
          SkipMessage: The database can't tell, so the message waits: the rules must not end a run that may have taken effect. Or
            another run has taken over the key.
        """
        guard = self._guard()
        try:
            found = self._swap_with_itself(claim)
        except StoreDown:
            claim.over = claim.committing = False
            guard.defer(delivery, "store_down")
        if found == guard.claims.completion(claim)[0]:
            return True
        if found is not None and not is_record_of(claim, found):
            # Above READ COMMITTED, the completion fails with an error of the database instead of `TakenOver`.
            self._give_way(delivery, claim, found)
        claim.over = claim.committing = False
        if is_transient(error) and delivery.elapsed_ms() > guard.claims.lease / 3:
            _warn_of_renewed_lease(delivery)
        return False

    def _give_way(self, delivery: Delivery, claim: Claim, theirs: bytes | None) -> NoReturn:
        """Skip a message whose key belongs to another run.

        Parameters:
          theirs: The record of the other run.
        """
        # The claim's end would be written over the other run's claim.
        self._drop(delivery, claim)
        logger.warning(
            "The run of message %s of actor %s was rolled back: its lease expired during the run, and "
            "another run took the key.",
            delivery.message.message_id,
            delivery.message.actor_name,
        )
        if message_id_of(theirs) != delivery.message.message_id:
            # The other message may fail, and moves only its own pipeline and group on. The next delivery waits for its end.
            delivery.add_follow_up(OutgoingMessage(delivery.next_message(), _AGAIN_MS))
        delivery.skip(Decision(Outcome.DUPLICATE, "stale"))

    def _drop(self, delivery: Delivery, claim: Claim) -> None:
        self._claims().drop(claim)
        delivery.claim = None

    def _guard(self) -> IdempotencyGuard:
        guard = guard_on(self.state)
        assert guard is not None
        return guard

    def _claims(self) -> Claims:
        return self._guard().claims


def _warn_of_renewed_lease(delivery: Delivery) -> None:
    logger.warning(
        "The lease of message %s of actor %s was renewed during the run, and its transaction sees an older state: above READ "
        "COMMITTED, a job must end within a third of its lease. Set a longer Idempotency(lease=…), or use READ COMMITTED.",
        delivery.message.message_id,
        delivery.message.actor_name,
    )


def _function_of(actor: Actor[..., Any]) -> Any:
    return unwrapped(actor.fn)
