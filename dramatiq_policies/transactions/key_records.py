"""Whose record is in the register of a key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnknownRecord
from ..idempotency.records import Record

if TYPE_CHECKING:
    from ..idempotency.claim import Claim

__all__ = ["is_of", "message_id_of"]


def is_of(claim: Claim, value: bytes) -> bool:
    """Whether the bytes are a record of the claim's run."""
    try:
        record = Record.decode(value)
    except UnknownRecord:
        return False
    own = claim.record
    return (record.owner, record.token, record.message_id) == (own.owner, own.token, own.message_id)


def message_id_of(value: bytes | None) -> str | None:
    """Return the id of the message that wrote a record; None without a readable record."""
    try:
        return None if value is None else Record.decode(value).message_id
    except UnknownRecord:
        return None
