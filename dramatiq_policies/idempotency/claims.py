"""Claims on keys: taken before a job begins, renewed while it runs, concluded when its message is settled.

What may happen between any two lines:

- The process dies after the claim: the record names it, so the redelivered message takes over at once where that death is
  certain, and when the lease ends where it is not.
- It dies after the retry was handed on and before the record says so: a later run of the same message proves that the
  earlier one has ended. Where hand-off and ack are two steps (RabbitMQ) the record says ``ending`` first, with what is being
  handed on: a redelivery hands it on once more, and does not run.
- It dies after the completion and before the ack: the redelivery finds its key completed, and was handed on in full.
- A reply of the store is lost: each claim's bytes are its own, so a claim that finds itself has been made.
- The store is down: nothing that asked for a claim runs without one (unless told so), and what must be written at the end
  is written when the store is back.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common import clock
from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..delivery.decision import COMPLETING, Decision
from ..delivery.history import now_ms, run_of
from ..outcomes import BAD_ENDINGS, Outcome
from ..stores import IdempotencyStore
from . import owner as owners
from . import records
from .earlier import EarlierRecords
from .exclusive import ExclusiveRuns
from .keys import encodable
from .lease_renewal import Leases
from .records import Record, Request, Start
from .store_client import StoreClient, StoreDown

if TYPE_CHECKING:
    from ..delivery.delivery import Delivery, OutgoingMessage

__all__ = ["Claim", "Claims", "Quarantined", "StoreDown", "is_dead"]

alerts = SafeLogger("dramatiq_policies.alerts")

#: The tokens of this process' claims, in all its brokers: a record of this process without one is of a run that is over.
_live: set[str] = set()
#: Those of claims of which it is not known whether the store took them: their runs never began.
_unconfirmed_tokens: set[str] = set()
_numbers = itertools.count(1)
#: Seconds between the tries to write a completion. Then it is written by the renewing thread.
_PAUSES = (0.05, 0.2, 0.75, 1.5, 2.5)
_TRIES = 20
#: For how long, in milliseconds, it is remembered that a start without a key does not count: until its message comes back,
#: which may be long after the end of its worker.
_EXCUSED_FOR = 86_400_000


class Claim:
    """A key held by a run of this process.

    Attributes:
      name: The register.
      record, value: What it holds, decoded and as bytes.
      keyed: Whether its completion is remembered; otherwise it only counts starts.
      over: Its ending is being written.
      excused: Its start does not count.
    """

    __slots__ = ("claims", "excused", "keep", "keyed", "name", "over", "record", "value")

    def __init__(self, claims: Claims, name: str, record: Record, value: bytes, keyed: bool, keep: int) -> None:
        self.claims = claims
        self.name = name
        self.record = record
        self.value = value
        self.keyed = keyed
        self.keep = keep
        self.over = False
        self.excused = False

    def ending(self, send: OutgoingMessage) -> None:
        """The run has ended, and its retry is about to be handed on."""
        if run_of(send.message.options) <= self.record.run:
            return  # Put back unrun. Handed on again, it would find the same, without end.
        options = {k: v for k, v in send.message.options.items() if k not in _UNCHANGED}
        due = None if send.delay is None else now_ms() + send.delay
        # Where that fails a crash before the ack runs it once more.
        self.rewrite(state=records.ENDING, follow={"options": options, "due": due})

    def rewrite(self, **changes: Any) -> bool:
        """Change what the register says of this run, if it is still this run's.

        Returns:
          False if the store can't be asked.
        """
        claims = self.claims
        with claims.rewriting:
            if self.over:
                return True
            record = self.record._replace(**changes)
            value = record.encode()
            try:
                found = claims.ask(partial(claims.store.swap, self.name, self.value, value, claims.lease + self.keep))
            except StoreDown:
                return False
            if found is None or found.value == value:
                self.record, self.value = record, value
            return True

    def completion(self) -> tuple[Any, ...]:
        """The command that remembers the completion, of a store that has round trips to share."""
        store: Any = self.claims.store
        command: tuple[Any, ...] = store.putting(self.name, records.completed_by(self.record.message_id), self.keep)
        return command

    def completed(self) -> None:
        """The completion has been remembered."""
        self.claims.drop(self)

    def conclude(self, decision: Decision) -> None:
        """The delivery was handed on: say so before it is acked."""
        self.claims.conclude(self, decision)


#: Options that may be large: the same in every run of a message, or not worth their place.
_UNCHANGED = frozenset({"pipe_target", "group_completion_callbacks", "traceback"})


class Quarantined(NamedTuple):
    """A run that began too often and never ended: what is left of its claim, to be concluded, and the number of starts."""

    claim: Claim
    starts: int


class Claims:
    """The claims of one broker in this process.

    Parameters:
      store: Where they are kept.
      lease: For how many milliseconds a claim holds without being renewed.
    """

    def __init__(self, store: IdempotencyStore, lease: int) -> None:
        self.store = store
        self.lease = lease
        #: Calls the store; a `StoreDown` where it can't.
        self.ask = StoreClient().ask
        self.leases = Leases(store, self.ask, lease)
        #: What 0.1.0 knew of keys that have another register now.
        self.earlier = EarlierRecords(store, self.ask)
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process nothing runs."""
        #: Held while a claim's record is changed, by whatever thread, or its ending decided.
        self.rewriting = threading.Lock()
        self.exclusive = ExclusiveRuns(self._expose)
        #: Whether the worker shuts down: whoever started it may kill it soon.
        self.stopping = False

    def claim(
        self, name: str, request: Request, *, keyed: bool, keep: int, earlier: str | None = None
    ) -> Claim | Quarantined | records.Action:
        """Claim a register for a run; or what becomes of the message instead.

        Parameters:
          keyed: Whether its completion is remembered.
          keep: For how long, in milliseconds.
          earlier: The register that 0.1.0 would have claimed, None if that is the same.

        Raises:
          StoreDown: The store could not be asked.
          UnknownRecord: It holds something that this version can't read.
        """
        owner = owners.this_process()
        token = str(next(_numbers))
        _live.add(token)
        claimed = False
        try:
            action = records.next_action(None, 0, request)
            if earlier is not None and (known := self.earlier.find(earlier, keep)) is not None:
                action = records.next_action(*known, request)
                if isinstance(action, records.Quarantine):
                    return self._quarantined(action, earlier, known[0], known[0].encode(), request, keyed, keep)
            expected: bytes | None = None
            for _ in range(_TRIES):
                if not isinstance(action, Start) or action.alone:
                    return action
                record = records.taken(action, request, owner=owner, token=token, since=now_ms(), keep=keep)
                value = record.encode()
                asked = clock.monotonic()
                found = self.ask(partial(self.store.swap, name, expected, value, self.lease + keep))
                if (found is None or found.value == value) and clock.monotonic() - asked > self.lease / 2_000:
                    # The answer came so late (a slow store, a process that was stopped) that the lease may be over.
                    expected = value
                    continue
                if found is None or found.value == value:
                    claimed = True
                    held = Claim(self, name, record, value, keyed, keep)
                    self.leases.hold(held)
                    return held
                stored = self._read(found.value)
                action = records.next_action(stored, found.left, request)
                if isinstance(action, records.Quarantine) and stored is not None and found.value is not None:
                    return self._quarantined(action, name, stored, found.value, request, keyed, keep)
                expected = found.value
            return records.WaitForOwner(self.lease)
        except StoreDown:
            if len(_unconfirmed_tokens) < 10_000:
                _unconfirmed_tokens.add(token)
            raise
        finally:
            if not claimed:
                _live.discard(token)

    def _quarantined(
        self,
        found: records.Quarantine,
        name: str,
        stored: Record,
        value: bytes,
        request: Request,
        keyed: bool,
        keep: int,
    ) -> Quarantined:
        # Another process' token may also be that of a run here.
        record = stored._replace(message_id=request.message_id, run=request.run, token="")
        return Quarantined(Claim(self, name, record, value, keyed, keep), found.starts)

    def _read(self, value: bytes | None) -> Record | None:
        if value is None:
            return None
        record = Record.decode(value)
        if record.token in _unconfirmed_tokens and record.owner == owners.this_process():
            return record._replace(starts=record.starts - 1)
        return record

    def _expose(self, delivery: Delivery) -> bool:
        """Record that the start of a run is no longer one made alone: a crash from now on is no proof against it."""
        claim: Claim | None = delivery.claim
        # Without a claim it is about to make one; whoever asks asks again.
        return claim is not None and claim.rewrite(beside=True)

    def uncount_start(self, delivery: Delivery) -> bool:
        """Don't count the start of a run that may be ended from outside.

        Returns:
          False if the store can't be asked.
        """
        claim: Claim | None = delivery.claim
        if claim is not None:
            if claim.excused:
                return True
            claim.excused = claim.rewrite(starts=claim.record.starts - 1, beside=True)
            return claim.excused
        # Without a key nothing is held: its lease is over as soon as it is written.
        message = delivery.message
        request = Request(message.message_id, run_of(message.options), is_dead)
        record = records.taken(
            Start(0), request, owner=owners.this_process(), token="", since=now_ms(), keep=_EXCUSED_FOR
        )
        name = crash_counter_name(message.message_id)
        try:
            self.ask(partial(self.store.swap, name, None, record.encode(), _EXCUSED_FOR))
        except StoreDown:
            return False
        return True

    def excuse_all(self) -> None:
        """The worker shuts down: from now on the end of this process is no crash of the jobs that run in it."""
        self.stopping = True
        for delivery in list(self.exclusive.running):
            is_to_claim = delivery.claim is None and delivery.key is not None
            if not is_to_claim and not self.uncount_start(delivery):
                return  # Each call may wait for a second, and the starts count.

    def conclude(self, claim: Claim, decision: Decision) -> None:
        """Remember how a claim's run has ended."""
        store, outcome = self.store, decision.outcome
        if outcome is Outcome.INTERRUPTED and claim.record.state == records.ENDING:
            # Given up half-way: the redelivery hands the retry on.
            self.drop(claim)
            return
        with self.rewriting:
            claim.over = True
        if not claim.keyed:
            write: Callable[[], object] = partial(store.swap, claim.name, claim.value, None, 1)
        elif outcome in COMPLETING:
            write = partial(store.put, claim.name, records.completed_by(claim.record.message_id), claim.keep)
        else:
            waits = outcome is Outcome.RETRIED or (outcome is Outcome.DEFERRED and decision.reason == "snoozed")
            ended = waits or outcome in BAD_ENDINGS or outcome is Outcome.SKIPPED
            lease = (decision.delay_ms or 0) + self.lease if waits else 1
            state = records.WAITING if waits else records.FREE
            record = records.released(claim.record, state, ended=ended, keep=claim.keep)
            value = None if record is None else record.encode()
            write = partial(store.swap, claim.name, claim.value, value, lease + claim.keep)
        pauses = _PAUSES if claim.keyed and outcome in COMPLETING else ()
        if not self._written(write, pauses):
            if pauses:
                alerts.critical(
                    "The completion of message %s is not remembered yet: the idempotency store is down. It is written when "
                    "the store is back; should this process end before, a duplicate will run again.",
                    claim.record.message_id,
                )
            self.leases.owe(claim, write)
            return
        self.drop(claim)

    def drop(self, claim: Claim) -> None:
        """Hold it no more, and write nothing: its run is over, or its worker has died."""
        self.leases.drop(claim)
        _live.discard(claim.record.token)

    def _written(self, write: Callable[[], object], pauses: tuple[float, ...]) -> bool:
        for pause in (*pauses, None):
            try:
                self.ask(write)
            except StoreDown:
                if pause is not None:
                    clock.sleep(pause)
            else:
                return True
        return False

    def close(self) -> None:
        """End the thread of the leases; the next claim starts another."""
        self.leases.close()


def crash_counter_name(message_id: str) -> str:
    """The register that counts the starts of a message without a key."""
    return encodable(f"\0{message_id}")


def is_dead(record: Record) -> bool:
    """Whether the run that a record speaks of is certainly over without having said so."""
    if record.owner == owners.this_process():
        return record.token not in _live
    return owners.is_dead(record.owner)
