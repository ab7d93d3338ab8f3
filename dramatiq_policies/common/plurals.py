"""Counts in the texts that people read."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, ``"1 message"`` or ``"2 messages"``.

    Parameters:
      count: How many.
      noun: The noun, singular.
      plural: The plural, if an s does not make it.
    """
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
