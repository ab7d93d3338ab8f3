"""The claims that this process holds: renewed together by one thread, and concluded late where the store was down."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..common.forks import after_fork
from ..common.safe_logger import SafeLogger
from ..outcomes import text_of
from ..stores import IdempotencyStore, Renewal
from . import records
from .store_client import StoreDown

if TYPE_CHECKING:
    from .claims import Claim

__all__ = ["Leases"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")

#: After so many failures in a row, and nothing else, the store is down.
_IN_A_ROW = 3
#: After so many refusals what is owed is given up.
_REFUSALS = 20


class Leases:
    """The claims of one broker that are held.

    Parameters:
      store, ask: Where they are kept, and what calls it.
      lease: For how many milliseconds a claim holds without being renewed.
    """

    def __init__(self, store: IdempotencyStore, ask: Callable[[Callable[[], Any]], Any], lease: int) -> None:
        self.store = store
        self.ask = ask
        self.lease = lease
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process nothing is held and no thread runs."""
        self._lock = threading.Lock()
        self._held: dict[str, Claim] = {}
        self._owed: list[tuple[Claim, Callable[[], object]]] = []
        #: How often the store has refused what is owed for a claim, and taken something else in the same turn.
        self._refusals: dict[Claim, int] = {}
        #: Whether the store took anything in the last turn.
        self._answers = False
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def hold(self, claim: Claim) -> None:
        """Renew a claim from now on, until it is let go."""
        self._held[claim.name] = claim
        self._ensure_thread()

    def drop(self, claim: Claim) -> None:
        if self._held.get(claim.name) is claim:
            del self._held[claim.name]

    def owe(self, claim: Claim, write: Callable[[], object]) -> None:
        """Keep what concludes a claim for when the store is back; until then it is held."""
        with self._lock:
            self._owed.append((claim, write))

    def _ensure_thread(self) -> None:
        if self._is_renewing():
            return
        with self._lock:
            if not self._is_renewing():
                self._stop = threading.Event()
                thread = threading.Thread(
                    target=self._renew_until, args=(self._stop,), name="dramatiq_policies.leases", daemon=True
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
                logger.exception("Leases could not be renewed; it is tried again.")

    def renew(self) -> None:
        """Write what is owed, and renew all leases in one round trip; where that fails, each alone.

        A debt, or a claim, at which the store fails again and again keeps no other from its turn.

        Raises:
          StoreDown: The store fails at all of them.
        """
        self._answers = answers = self.flush_pending_writes()
        held = list(self._held.values())
        if not held:
            return
        renewals = [Renewal(claim.name, claim.value, self.lease + claim.keep) for claim in held]
        try:
            kept: list[bool | None] = list(self.ask(partial(self.store.renew, renewals)))
        except StoreDown:
            kept = self._each_alone(renewals)
            if not any(answer is not None for answer in kept):
                self._answers = answers
                raise
        self._answers = True
        for claim, renewal, ok in zip(held, renewals, kept, strict=True):
            if ok or claim.value != renewal.value or self._held.get(claim.name) is not claim:
                continue
            try:
                self._take_back(claim)
            except Exception as error:
                logger.warning(
                    "The claim of message %s can't be renewed (%s): its lease may end while it runs.",
                    claim.record.message_id,
                    type(error).__name__,
                )

    def _each_alone(self, renewals: list[Renewal]) -> list[bool | None]:
        """Renew one after the other, and no more once the store has failed at some in a row: then it is down."""
        kept: list[bool | None] = []
        for renewal in renewals:
            if kept[-_IN_A_ROW:] == [None] * _IN_A_ROW:
                kept.append(None)
                continue
            try:
                kept += self.store.renew([renewal])
            except Exception:
                kept.append(None)
        return kept

    def _take_back(self, claim: Claim) -> None:
        """Hold a claim that was not found where it was, if nobody else holds it."""
        found = self.store.swap(claim.name, None, claim.value, self.lease + claim.keep)
        if found is None and claim.over:
            # Its ending was written in between, and took the register away.
            self.store.swap(claim.name, claim.value, None, 1)
        elif found is None or found.value in (claim.value, records.completed_by(claim.record.message_id)):
            return  # Had lapsed, and is held again; or its completion was written in between.
        elif self._held.get(claim.name) is claim:
            logger.warning(
                "The claim of message %s is lost while it runs: its lease had ended and another took over, or it was "
                "forgotten.",
                claim.record.message_id,
            )

    def flush_pending_writes(self) -> bool:
        """Write what could not be written when its job was over; whether the store took any of it.

        What it does not take goes behind the others. It is given up where the store has refused it often and taken
        others meanwhile.
        """
        with self._lock:
            debts = list(self._owed)
        refused: list[tuple[Claim, Exception]] = []
        taken, answers = False, self._answers
        for debt in debts:
            claim, write = debt
            try:
                # What was refused before is no news, nor a sign that the store is down.
                write() if claim in self._refusals else self.ask(write)
            except Exception as error:
                with self._lock:
                    self._owed = [*(one for one in self._owed if one is not debt), debt]
                refused.append((claim, error))
                if len(refused) == _IN_A_ROW and not taken:
                    break
            else:
                taken = True
                self._forgive(claim)
        for claim, refusal in refused:
            tries = self._refusals.get(claim, 0) + (taken or answers)
            self._refusals[claim] = tries
            if tries >= _REFUSALS:
                self._forgive(claim)
                alerts.critical(
                    "The ending of message %s can't be written to the idempotency store, which takes others "
                    "(%s: %s). It is given up: once its lease has ended a duplicate may run again.",
                    claim.record.message_id,
                    type(refusal).__name__,
                    text_of(refusal),
                )
        return taken

    def _forgive(self, claim: Claim) -> None:
        with self._lock:
            self._owed = [debt for debt in self._owed if debt[0] is not claim]
        self._refusals.pop(claim, None)
        claim.claims.drop(claim)

    def close(self) -> None:
        """End the thread; the next claim starts another."""
        self._stop.set()
        self.flush_pending_writes()
        if self._owed:
            logger.warning("%d endings could not be written to the idempotency store.", len(self._owed))
        if self._thread is not None:
            # It may wait for a store that does not answer; it ends by itself then.
            self._thread.join(1)
