"""One thread renews all leases of this process, and writes the ends of jobs that the store could not take before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from ..common.forks import after_fork
from ..common.plurals import counted
from ..common.safe_logger import SafeLogger
from ..outcomes import text_of
from ..stores import IdempotencyStore, Renewal
from . import records
from .claim import Claim
from .store_client import StoreDown
from .tokens import discard_token

__all__ = ["Leases"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")

#: After this many failures in a row and no success, the store counts as down.
_DOWN_AFTER = 3
#: After this many refusals a pending write is given up.
_MAX_REFUSALS = 20


class Leases:
    """The held claims of one broker.

    Parameters:
      store: The store of the claims.
      call_store: Calls the store; raises `StoreDown` if the call fails.
      lease: For how many milliseconds a claim holds without a renewal.
    """

    def __init__(self, store: IdempotencyStore, call_store: Callable[[Callable[[], Any]], Any], lease: int) -> None:
        self.store = store
        self.call_store = call_store
        self.lease = lease
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Start without claims and without a thread."""
        self._lock = threading.Lock()
        self._held: dict[str, Claim] = {}
        self._pending_writes: list[tuple[Claim, Callable[[], object]]] = []
        #: How often the store has refused the pending write of a claim and taken another write in the same turn.
        self._refusals: dict[Claim, int] = {}
        #: Whether the store took any write in the last turn.
        self._answers = False
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def hold(self, claim: Claim) -> None:
        """Renew a claim from now on, until `drop`."""
        self._held[claim.name] = claim
        self._ensure_thread()

    def drop(self, claim: Claim) -> None:
        """Renew a claim no longer: the run is over, or the worker has died."""
        if self._held.get(claim.name) is claim:
            del self._held[claim.name]
        discard_token(claim.record.token)

    def write_later(self, claim: Claim, write: Callable[[], object]) -> None:
        """Queue the write that finishes a claim, until the store is back. The claim stays held."""
        with self._lock:
            self._pending_writes.append((claim, write))

    def _ensure_thread(self) -> None:
        if self._is_renewing():
            return
        with self._lock:
            if not self._is_renewing():
                self._stop = threading.Event()
                thread = threading.Thread(
                    target=self._renew_until, args=(self._stop,), name="dramatiq-policies-leases", daemon=True
                )
                thread.start()
                self._thread = thread

    def _is_renewing(self) -> bool:
        return self._thread is not None and not self._stop.is_set()

    def _renew_until(self, stop: threading.Event) -> None:
        while not stop.wait(self.lease / 3_000):
            try:
                self.renew()
            except StoreDown:
                pass
            except Exception:
                logger.exception(
                    "The leases of the running jobs could not be renewed; the worker tries again. When a lease has expired, another "
                    "worker may run the job too."
                )

    def renew(self) -> None:
        """Flush the pending writes, and renew all leases in one round trip. After a failed round trip, renew one lease after the other.

        A write or a claim on which the store always fails does not block the others.

        Raises:
          StoreDown: The store fails on all leases.
        """
        self._answers = answers = self.flush_pending_writes()
        # A renewal would wait for the lock of a transaction that is about to commit.
        held = [claim for claim in list(self._held.values()) if not claim.committing]
        if not held:
            return
        renewals = [Renewal(claim.name, claim.value, self.lease + claim.retention) for claim in held]
        try:
            renewed: list[bool | None] = list(self.call_store(partial(self.store.renew, renewals)))
        except StoreDown:
            renewed = self._renew_one_by_one(renewals)
            if not any(answer is not None for answer in renewed):
                self._answers = answers
                raise
        self._answers = True
        for claim, renewal, ok in zip(held, renewals, renewed, strict=True):
            if ok or claim.value != renewal.value or self._held.get(claim.name) is not claim:
                continue
            try:
                self._reclaim(claim)
            except Exception as error:
                logger.warning(
                    "The claim of message %s can't be renewed (%s). If the lease expires, another worker may run the job too.",
                    claim.record.message_id,
                    type(error).__name__,
                )

    def _renew_one_by_one(self, renewals: list[Renewal]) -> list[bool | None]:
        """Renew one lease after the other. Stop after three failures in a row: the store is down."""
        renewed: list[bool | None] = []
        for renewal in renewals:
            if renewed[-_DOWN_AFTER:] == [None] * _DOWN_AFTER:
                renewed.append(None)
                continue
            try:
                renewed += self.store.renew([renewal])
            except Exception:
                renewed.append(None)
        return renewed

    def _reclaim(self, claim: Claim) -> None:
        """Write a lost claim again, if no other worker holds the key."""
        found = self.store.swap(claim.name, None, claim.value, self.lease + claim.retention)
        if found is None and claim.over:
            # Meanwhile another thread has written the end of the job, which cleared the register: clear the register again.
            self.store.swap(claim.name, claim.value, None, 1)
        elif found is None or found.value == claim.value or _is_completed_by(found.value, claim.record.message_id):
            return  # The lease had lapsed and now holds again, or the completion was written meanwhile.
        elif self._held.get(claim.name) is claim:
            logger.warning(
                "The claim of message %s was lost during the run: the lease expired and another worker "
                "took the key, or somebody deleted the record. The job may run twice.",
                claim.record.message_id,
            )

    def flush_pending_writes(self) -> bool:
        """Write the ends of jobs that the store could not take before.

        A refused write moves to the end of the queue. After 20 refusals, in turns in which the store took other writes, the
        write is given up.

        Returns:
          Whether the store took any write.
        """
        with self._lock:
            pending = list(self._pending_writes)
        refused: list[tuple[Claim, Exception]] = []
        taken, answers = False, self._answers
        for entry in pending:
            claim, write = entry
            try:
                # Not by call_store() after a refusal: a repeated refusal is neither news nor a sign of an outage.
                write() if claim in self._refusals else self.call_store(write)
            except Exception as error:
                with self._lock:
                    self._pending_writes = [*(one for one in self._pending_writes if one is not entry), entry]
                refused.append((claim, error))
                if len(refused) == _DOWN_AFTER and not taken:
                    break
            else:
                taken = True
                self._forget_write(claim)
        for claim, refusal in refused:
            tries = self._refusals.get(claim, 0) + (taken or answers)
            self._refusals[claim] = tries
            if tries >= _MAX_REFUSALS:
                self._forget_write(claim)
                alerts.critical(
                    "The idempotency store refuses the record for message %s and accepts others (%s: %s). "
                    "The worker drops the record: when the lease has expired, a duplicate may run again.",
                    claim.record.message_id,
                    type(refusal).__name__,
                    text_of(refusal),
                )
        return taken

    def _forget_write(self, claim: Claim) -> None:
        with self._lock:
            self._pending_writes = [entry for entry in self._pending_writes if entry[0] is not claim]
        self._refusals.pop(claim, None)
        self.drop(claim)

    def close(self) -> None:
        """End the thread; the next claim starts a new thread."""
        self._stop.set()
        self.flush_pending_writes()
        if self._pending_writes:
            logger.warning(
                "The ends of %s could not be written to the idempotency store: duplicates of these jobs may run again.",
                counted(len(self._pending_writes), "job"),
            )
        if self._thread is not None:
            # If the thread waits for a silent store, the thread ends later by itself.
            self._thread.join(1)


def _is_completed_by(value: bytes | None, message_id: str) -> bool:
    """Return whether a record says that the message has completed the key. The fingerprint may be missing."""
    completed = records.completed_by(message_id)
    return value is not None and value[: len(completed)] == completed
