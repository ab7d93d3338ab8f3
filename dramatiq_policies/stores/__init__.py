"""The protocol of an idempotency store.

A store is a set of registers, one per key, with compare-and-swap and expiry. A store does not interpret the registers: the rules
of claims, leases and takeovers are in `dramatiq_policies.idempotency.actions`. If you write a store, guarantee:

- Each call is atomic for its key. All processes see the calls for one key in one order: after `swap` wrote a value, the next call
  of any process finds this value. If a store may lose an acknowledged write (failover to a lagging replica, eviction), a job may
  run twice.
- The store has a single clock: ``ttl`` counts from the write, independent of the clocks of the callers. An expired register is
  absent.
- Keys are any text, even with NUL characters. Values are bytes, never empty, and are returned unchanged.
- A failed call raises within a bounded time. Callers repeat failed calls, so a call must be safe to repeat even if the first try
  was carried out.
- Any thread may call. After a fork, the child uses new connections.

`dramatiq_policies.testing.IdempotencyStoreContract` tests these guarantees for your store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

__all__ = ["Entry", "IdempotencyStore", "Renewal"]


class Entry(NamedTuple):
    """The value of a register, and the milliseconds left until expiry."""

    value: bytes | None
    left: int


class Renewal(NamedTuple):
    """Let a register expire ``ttl`` milliseconds from now, if the register still holds ``value``."""

    key: str
    value: bytes
    ttl: int


@runtime_checkable
class IdempotencyStore(Protocol):
    """The methods of a store; the module has the guarantees. ``ttl`` is in milliseconds, greater than 0."""

    def swap(self, key: str, expected: bytes | None, value: bytes | None, ttl: int) -> Entry | None:
        """Write ``value`` if the register holds ``expected``. An ``expected`` of None means absent; a ``value`` of None removes.

        Returns:
          None after a write, else the current entry.
        """

    def put(self, key: str, value: bytes, ttl: int) -> None:
        """Write ``value`` unconditionally."""

    def get(self, key: str) -> Entry:
        """Return the current entry, or ``Entry(None, 0)``."""

    def delete(self, key: str) -> bool:
        """Remove the register. Return whether the register existed."""

    def renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        """Prolong many registers in one round trip. Return for each register whether the value matched."""
