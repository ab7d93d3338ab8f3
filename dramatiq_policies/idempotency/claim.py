"""A claim on a key, as plain data. `Claims` makes and writes claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from ..delivery.delivery import Delivery
    from .records import Record

__all__ = ["Claim", "QuarantinedClaim", "claim_of"]


@dataclass(slots=True, eq=False)
class Claim:
    """A key held by a run of this process. The record changes only under ``Claims.rewriting``.

    Attributes:
      name: The register of the key.
      record, value: The content of the register, decoded and as bytes.
      keyed: Whether the store remembers the completion; otherwise the claim only counts starts.
      retention: For how long the store remembers the completion, in milliseconds.
      over: The end of the run is being written.
      committing: A transaction is writing the end of the run, and is about to commit: don't renew the lease.
      start_uncounted: The start no longer counts towards ``max_crashes``.
      has_earlier_name: Whether 0.1.0 names the register alike, and may read the record.
    """

    name: str
    record: Record
    value: bytes
    keyed: bool
    retention: int
    over: bool = False
    committing: bool = False
    start_uncounted: bool = False
    has_earlier_name: bool = True


class QuarantinedClaim(NamedTuple):
    """The claim of a run that began too often and never ended, still to be finished, and the number of starts."""

    claim: Claim
    starts: int


def claim_of(delivery: Delivery) -> Claim | None:
    """Return the claim of a delivery; None without a claim."""
    return cast("Claim | None", delivery.claim)
