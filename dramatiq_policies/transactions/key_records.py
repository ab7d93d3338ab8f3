"""Whose record is in the register of a key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnknownRecord
from ..idempotency.records import Record

if TYPE_CHECKING:
    from ..idempotency.claim import Claim

__all__ = ["is_record_of", "message_id_of"]


def is_record_of(claim: Claim, value: bytes) -> bool:
    """Whether the bytes are a record of the claim's run."""
    record, own = _decoded(value), claim.record
    return record is not None and (record.owner, record.token, record.message_id) == (
        own.owner,
        own.token,
        own.message_id,
    )


def message_id_of(value: bytes | None) -> str | None:
    """Return the id of the message that wrote a record; None without a readable record."""
    record = None if value is None else _decoded(value)
    return None if record is None else record.message_id


def _decoded(value: bytes) -> Record | None:
    try:
        return Record.decode(value)
    except UnknownRecord:
        return None
