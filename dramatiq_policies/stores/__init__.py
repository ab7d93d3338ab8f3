"""Where idempotency remembers: the protocol that a store implements.

A store is a set of registers, one for each key, with compare-and-swap and expiry. It need not know what a register means:
every rule of claims, leases and takeovers is in `dramatiq_policies.idempotency.records`, above it. What it must guarantee:

- Each call is atomic for its key, and calls for one key have one order that all processes see: what `swap` wrote is what
  the next call finds, whoever makes it. A store that may forget an acknowledged write (a failover to a replica that lags,
  an evicting cache) makes a second run possible.
- Time is the store's own: ``ttl`` counts from the moment of the write, by one clock, whatever the callers' clocks say. An
  expired register is absent.
- Keys are any text, also with a NUL in it. Values are bytes, never empty, and come back as they were.
- What can't be done raises, within a bounded time. A call that raised may or may not have been carried out: callers repeat
  it, so it must not matter if it was.
- Calls come from any thread. After a fork the child uses the store too, and no connection of its parent's.

`dramatiq_policies.testing.IdempotencyStoreContract` tests all this for a store of your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

__all__ = ["Entry", "IdempotencyStore", "Renewal"]


class Entry(NamedTuple):
    """What a register holds, and for how many more milliseconds."""

    value: bytes | None
    left: int


class Renewal(NamedTuple):
    """A register that is to live ``ttl`` milliseconds from now, if it still holds ``value``."""

    key: str
    value: bytes
    ttl: int


@runtime_checkable
class IdempotencyStore(Protocol):
    """See the module. ``ttl`` is in milliseconds, and more than 0."""

    def swap(self, key: str, expected: bytes | None, value: bytes | None, ttl: int) -> Entry | None:
        """Write ``value`` if the register holds ``expected`` (None: is absent); a ``value`` of None removes it.

        Returns:
          None if it was written; else what it holds instead.
        """

    def put(self, key: str, value: bytes, ttl: int) -> None:
        """Write ``value``, whatever the register holds."""

    def get(self, key: str) -> Entry:
        """What the register holds; ``Entry(None, 0)`` if nothing."""

    def delete(self, key: str) -> bool:
        """Empty the register; whether there was something in it."""

    def renew(self, renewals: Sequence[Renewal]) -> list[bool]:
        """Prolong many registers in one round trip; for each whether it held what was expected."""
