"""The tokens of the claims of this process, of all brokers. A token makes the bytes of each claim unique."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from . import owner as owners

if TYPE_CHECKING:
    from .records import Record

__all__ = ["add_unconfirmed", "discard_token", "is_dead", "is_unconfirmed", "new_token"]

#: The tokens of the running claims. A record of this process with another token belongs to an ended run.
_active_tokens: set[str] = set()
#: The tokens of claims without a reply: the store may hold them, but their runs never began.
_unconfirmed_tokens: set[str] = set()
_UNCONFIRMED_AT_MOST = 10_000
_numbers = itertools.count(1)


def new_token() -> str:
    """Return the token of a new claim. The token counts as active until `discard_token`."""
    token = str(next(_numbers))
    _active_tokens.add(token)
    return token


def discard_token(token: str) -> None:
    """The run of a claim is over, or no claim was made."""
    _active_tokens.discard(token)


def add_unconfirmed(token: str) -> None:
    """The store has not replied to a claim."""
    if len(_unconfirmed_tokens) < _UNCONFIRMED_AT_MOST:
        _unconfirmed_tokens.add(token)


def is_unconfirmed(record: Record) -> bool:
    """Return whether a record is a claim of this process whose run never began."""
    return record.token in _unconfirmed_tokens and record.owner == owners.this_process()


def is_dead(record: Record) -> bool:
    """Return whether the run of a record has certainly died without recording its end."""
    if record.owner == owners.this_process():
        return record.token not in _active_tokens
    return owners.is_dead(record.owner)
