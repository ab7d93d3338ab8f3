"""Claims on keys: made before a job begins, renewed while the job runs, finished when the message is settled.

Failures that may happen between any two lines, and how the claim survives them:

- The process dies after the claim. The record names the process. The redelivered message takes over at once if the death
  is certain, otherwise when the lease ends.
- The process dies after the retry was published and before the record changes. A later run of the same message proves
  that the earlier run has ended. Where publish and ack are two steps (RabbitMQ), the record first changes to ``ending``
  and holds the retry: a redelivery publishes the retry again and does not run the job.
- The process dies after the completion and before the ack. The redelivery finds the key completed; all follow-up messages
  were published before the completion.
- A reply of the store is lost. The bytes of each claim are unique: if a claim finds its own bytes, the claim was made.
- The store is down. A message that needs a claim waits (unless ``on_store_error="run"``), and the thread of the leases
  writes the ends of jobs when the store is back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..common import clock
from ..common.clock import now_ms
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..delivery.decision import COMPLETING, Decision
from ..delivery.history import run_of
from ..outcomes import BAD_ENDINGS, Outcome
from ..stores import IdempotencyStore
from . import actions, records
from . import owner as owners
from .actions import Request, Start
from .claim import Claim, QuarantinedClaim, claim_of
from .earlier import Completion, EarlierRecords
from .exclusive import ExclusiveRuns
from .lease_renewal import Leases
from .options import crash_counter_name
from .records import Record
from .store_client import StoreClient, StoreDown
from .tokens import add_unconfirmed, discard_token, is_dead, is_unconfirmed, new_token

if TYPE_CHECKING:
    from ..delivery.delivery import Delivery
    from ..delivery.outgoing import OutgoingMessage

__all__ = ["Claims"]

alerts = SafeLogger("dramatiq_policies.alerts")

#: Seconds between the tries to write a completion. After the last try the thread of the leases writes the completion.
_COMPLETION_PAUSES = (0.05, 0.2, 0.75, 1.5, 2.5)
_MAX_SWAPS = 20
#: For how long, in milliseconds, the store remembers that a start without a key does not count. The message may come back
#: long after the end of its worker.
_UNCOUNTED_FOR = 86_400_000


#: Large options that the record leaves out: the same in every run of a message, or not worth their space.
_UNCHANGED = frozenset({"pipe_target", "group_completion_callbacks", "traceback"})


class Claims:
    """The claims of one broker in this process.

    Parameters:
      store: The store of the claims.
      lease: For how many milliseconds a claim holds without a renewal.
    """

    def __init__(self, store: IdempotencyStore, lease: int) -> None:
        self.store = store
        self.lease = lease
        #: Calls the store; raises `StoreDown` if the call fails.
        self.call_store = StoreClient().call
        self.leases = Leases(store, self.call_store, lease)
        #: Records that 0.1.0 wrote under another register name.
        self.earlier = EarlierRecords(store, self.call_store)
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start without claims: no job runs in a new process."""
        #: Held while a thread changes a claim's record or decides its end.
        self.rewriting = threading.Lock()
        self.exclusive = ExclusiveRuns(self._record_beside)
        #: Whether the worker shuts down: its supervisor may kill the process soon.
        self.stopping = False

    def claim(
        self, name: str, request: Request, *, keyed: bool, retention: int, earlier: str | None = None
    ) -> Claim | QuarantinedClaim | actions.Action:
        """Claim a register for a run, or return the action to take instead.

        Parameters:
          name: The register.
          request: The message and its run.
          keyed: Whether the store remembers the completion.
          retention: For how long, in milliseconds.
          earlier: The register that 0.1.0 would have claimed; None if the name is the same.

        Raises:
          StoreDown: The store is down.
          UnknownRecord: This version can't read the record in the register.
        """
        owner = owners.this_process()
        token = new_token()
        claimed = False
        try:
            action = actions.next_action(None, 0, request)
            if earlier is not None and (known := self.earlier.find(earlier, retention)) is not None:
                action = actions.next_action(*known, request)
                if isinstance(action, actions.Quarantine):
                    return self._quarantined(action, earlier, known[0], known[0].encode(), request, keyed, retention)
            expected: bytes | None = None
            for _ in range(_MAX_SWAPS):
                if not isinstance(action, Start) or action.alone:
                    return action
                record = actions.claimed(
                    action, request, owner=owner, token=token, started_at=now_ms(), retention=retention
                )
                value = record.encode()
                called_at = clock.monotonic()
                found = self.call_store(partial(self.store.swap, name, expected, value, self.lease + retention))
                if (found is None or found.value == value) and clock.monotonic() - called_at > self.lease / 2_000:
                    # After a late reply (slow store, stopped process) the lease may be over: claim again.
                    expected = value
                    continue
                if found is None or found.value == value:
                    claimed = True
                    held = Claim(name, record, value, keyed, retention, has_earlier_name=earlier is None)
                    self.leases.hold(held)
                    return held
                stored = self._read(name, found.value, request)
                action = actions.next_action(stored, found.left, request)
                if isinstance(action, actions.Quarantine) and stored is not None and found.value is not None:
                    return self._quarantined(action, name, stored, found.value, request, keyed, retention)
                expected = found.value
            return actions.WaitForOwner(self.lease)
        except StoreDown:
            add_unconfirmed(token)
            raise
        finally:
            if not claimed:
                discard_token(token)

    def _quarantined(
        self,
        found: actions.Quarantine,
        name: str,
        stored: Record,
        value: bytes,
        request: Request,
        keyed: bool,
        retention: int,
    ) -> QuarantinedClaim:
        # A run of this process may have the same token as the other process.
        record = stored._replace(message_id=request.message_id, run=request.run, token="")
        return QuarantinedClaim(Claim(name, record, value, keyed, retention), found.starts)

    def _read(self, name: str, value: bytes | None, request: Request) -> Record | None:
        if value is None:
            return None
        record = Record.decode(value)
        if record.state == records.COMPLETED:
            return self.earlier.with_arguments(name, record) if request.args else record
        if is_unconfirmed(record):
            return record._replace(starts=record.starts - 1)
        return record

    def _record_beside(self, delivery: Delivery) -> bool:
        """Record that a job no longer runs alone: from now on a crash is no proof against the job."""
        claim = claim_of(delivery)
        # Without a claim the job is about to make one: return False, and the caller tries again.
        return claim is not None and self.rewrite(claim, beside=True)

    def uncount_start(self, delivery: Delivery) -> bool:
        """Don't count the start of a run whose process may be ended from outside.

        Returns:
          False if the store is down.
        """
        claim = claim_of(delivery)
        if claim is not None:
            if claim.start_uncounted:
                return True
            claim.start_uncounted = self.rewrite(claim, starts=claim.record.starts - 1, beside=True)
            return claim.start_uncounted
        # Without a key the job holds nothing: the record's lease is over as soon as the store has the record.
        message = delivery.message
        request = Request(message.message_id, run_of(message.options), is_dead)
        record = actions.claimed(
            Start(0), request, owner=owners.this_process(), token="", started_at=now_ms(), retention=_UNCOUNTED_FOR
        )
        name = crash_counter_name(message.message_id)
        try:
            self.call_store(partial(self.store.swap, name, None, record.encode(), _UNCOUNTED_FOR))
        except StoreDown:
            return False
        return True

    def uncount_running_starts(self) -> None:
        """Uncount the starts of all running jobs: the worker shuts down, so the end of the process is no crash."""
        self.stopping = True
        for delivery in list(self.exclusive.running):
            is_to_claim = delivery.claim is None and delivery.key is not None
            if not is_to_claim and not self.uncount_start(delivery):
                return  # The store is down, and each call may wait for a second. The other starts count.

    def rewrite(self, claim: Claim, **changes: Any) -> bool:
        """Change the record of a run, if the register still belongs to the run.

        Returns:
          False if the store is down.
        """
        with self.rewriting:
            if claim.over:
                return True
            record = claim.record._replace(**changes)
            value = record.encode()
            try:
                found = self.call_store(
                    partial(self.store.swap, claim.name, claim.value, value, self.lease + claim.retention)
                )
            except StoreDown:
                return False
            if found is None or found.value == value:
                claim.record, claim.value = record, value
            return True

    def record_ending(self, claim: Claim, send: OutgoingMessage) -> None:
        """Record, before the retry is published, that the run has ended."""
        if run_of(send.message.options) <= claim.record.run:
            return  # The message was requeued without a run. Published again, the message would loop without end.
        options = {k: v for k, v in send.message.options.items() if k not in _UNCHANGED}
        due = None if send.delay is None else now_ms() + send.delay
        # If the store fails here, a crash before the ack runs the job again.
        self.rewrite(claim, state=records.ENDING, retry={"options": options, "due": due})

    def completion_command(self, claim: Claim) -> tuple[Any, ...]:
        """Return the command that writes the completion, for a store with a `CommandBatcher`."""
        store: Any = self.store
        command: tuple[Any, ...] = store.putting(claim.name, *self.completion(claim))
        return command

    def completion(self, claim: Claim) -> Completion:
        """Return what the store keeps for the key, once completed: value and ttl of the register, then of its companion, if any."""
        record = claim.record
        if claim.has_earlier_name and record.args:
            return self.earlier.completion(claim.name, record, claim.retention)
        return records.completed_by(record.message_id, record.args), claim.retention

    def finish(self, claim: Claim, decision: Decision) -> None:
        """Record how the run of a claim has ended: after the follow-up messages are published, before the message is acked."""
        store, outcome = self.store, decision.outcome
        if outcome is Outcome.INTERRUPTED and claim.record.state == records.ENDING:
            # Interrupted during the publish: the redelivery publishes the retry.
            self.drop(claim)
            return
        with self.rewriting:
            claim.over = True
        if not claim.keyed:
            write: Callable[[], object] = partial(store.swap, claim.name, claim.value, None, 1)
        elif outcome in COMPLETING:
            write = partial(store.put, claim.name, *self.completion(claim))
        else:
            waits = outcome is Outcome.RETRIED or (outcome is Outcome.DEFERRED and decision.reason == "snoozed")
            ended = waits or outcome in BAD_ENDINGS or outcome is Outcome.SKIPPED
            lease = (decision.delay_ms or 0) + self.lease if waits else 1
            state = records.WAITING if waits else records.FREE
            record = records.released(claim.record, state, ended=ended, retention=claim.retention)
            value = None if record is None else record.encode()
            write = partial(store.swap, claim.name, claim.value, value, lease + claim.retention)
        pauses = _COMPLETION_PAUSES if claim.keyed and outcome in COMPLETING else ()
        if not self._written(write, pauses):
            if pauses:
                alerts.critical(
                    "The completion of message %s is not recorded yet: the idempotency store is down. "
                    "This process writes the completion when the store is back; if the process ends "
                    "earlier, a duplicate runs again.",
                    claim.record.message_id,
                )
            self.leases.write_later(claim, write)
            return
        self.drop(claim)

    def drop(self, claim: Claim) -> None:
        """Stop holding a claim and write nothing: the run is over, or the worker has died."""
        self.leases.drop(claim)

    def _written(self, write: Callable[[], object], pauses: tuple[float, ...]) -> bool:
        for pause in (*pauses, None):
            try:
                self.call_store(write)
            except StoreDown:
                if pause is not None:
                    clock.sleep(pause)
            else:
                return True
        return False

    def close(self) -> None:
        """End the thread of the leases; the next claim starts a new thread."""
        self.leases.close()
