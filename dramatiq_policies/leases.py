"""The claims that this process holds: renewed together by one thread, and concluded late where the store was down."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from . import records
from .forks import after_fork
from .safe_logger import SafeLogger
from .store_calls import StoreDown
from .stores import IdempotencyStore, Renewal

if TYPE_CHECKING:
    from .claims import Claim

__all__ = ["Leases"]

logger = SafeLogger("dramatiq_policies.outcomes")


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
        self.begin_anew()
        after_fork(self)

    def begin_anew(self) -> None:
        """In a new process nothing is held and no thread runs."""
        self._lock = threading.Lock()
        self._held: dict[str, Claim] = {}
        self._owed: list[tuple[Claim, Callable[[], object]]] = []
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def hold(self, claim: Claim) -> None:
        """Renew a claim from now on, until it is let go."""
        self._held[claim.name] = claim
        self._ensure_thread()

    def let_go(self, claim: Claim) -> None:
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
                    target=self._renew_until, args=(self._stop,), name="dramatiq_policies-leases", daemon=True
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
        """Write what is owed, and renew all leases in one round trip."""
        self.settle_debts()
        held = list(self._held.values())
        if not held:
            return
        renewals = [Renewal(claim.name, claim.value, self.lease + claim.keep) for claim in held]
        kept = self.ask(partial(self.store.renew, renewals))
        for claim, renewal, ok in zip(held, renewals, kept, strict=True):
            if ok or claim.value != renewal.value or self._held.get(claim.name) is not claim:
                continue
            found = self.ask(partial(self.store.swap, claim.name, None, claim.value, self.lease + claim.keep))
            if found is None and claim.over:
                # Its ending was written in between, and took the register away.
                self.ask(partial(self.store.swap, claim.name, claim.value, None, 1))
            elif found is None or found.value in (claim.value, records.completed_by(claim.record.message_id)):
                continue  # Had lapsed, and is held again; or its completion was written in between.
            elif self._held.get(claim.name) is claim:
                logger.warning(
                    "The claim of message %s is lost while it runs: its lease had ended and another took over, or it was "
                    "forgotten.",
                    claim.record.message_id,
                )

    def settle_debts(self) -> None:
        """Write what could not be written when its job was over."""
        while True:
            with self._lock:
                if not self._owed:
                    return
                claim, write = self._owed[0]
            self.ask(write)
            with self._lock:
                self._owed = [debt for debt in self._owed if debt[0] is not claim]
            claim.claims.let_go(claim)

    def close(self) -> None:
        """End the thread; the next claim starts another."""
        self._stop.set()
        try:
            self.settle_debts()
        except StoreDown:
            logger.warning("%d endings could not be written to the idempotency store.", len(self._owed))
        if self._thread is not None:
            # It may wait for a store that does not answer; it ends by itself then.
            self._thread.join(1)
