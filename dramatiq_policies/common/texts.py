"""Texts of unknown origin: encodable where they are taken, printable and without credentials where they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["UNPRINTABLE", "encodable", "encodable_all", "printable"]

#: Control characters (C0, DEL, C1), the marks that change a text's direction, the line separators of Unicode, the byte order mark,
#: and halves of a character, which no encoding has.
UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}]")
_UNPRINTABLE_BUT_LINES = re.compile(f"(?![\\n\\t])[{UNPRINTABLE}]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def encodable(text: str) -> str:
    r"""The text with each half of a character, which UTF-8 can't encode, as its escape: ``\ud83d``."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def encodable_all(value: Any) -> Any:
    """The value with every text in it encodable, in mappings and lists at any depth; a frame's ``vars`` stay as they are."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {encodable_all(name): one if name == "vars" else encodable_all(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [encodable_all(one) for one in value]
    return value


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return _SHORT.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text on one line, with each character that could forge a line or command a terminal as its escape.

    Parameters:
      text: From anybody: an exception's text, a message's id, a name.
      lines: Whether line ends and tabs stay as they are, for what has many lines by nature, as a traceback has.
    """
    if text.isascii() and text.isprintable():
        return text
    return (_UNPRINTABLE_BUT_LINES if lines else _UNPRINTABLE).sub(_escape, text)
