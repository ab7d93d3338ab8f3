"""Texts of unknown origin: encodable where they are taken, printable and without credentials where they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["UNPRINTABLE", "encodable", "encodable_all", "printable"]

#: Control characters (C0, DEL, C1), marks of text direction, line separators of Unicode, the byte order mark and lone surrogates.
UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_UNPRINTABLE = re.compile(f"[{UNPRINTABLE}]")
_UNPRINTABLE_BUT_LINES = re.compile(f"(?![\\n\\t])[{UNPRINTABLE}]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def encodable(text: str) -> str:
    r"""Escape each lone surrogate, because UTF-8 can't encode one: ``\ud83d``."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def encodable_all(value: object) -> Any:
    """Make all texts in a value encodable, at any depth of mappings and lists. The ``vars`` of a frame stay unchanged."""
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
    r"""Return the text on one line. Characters that could forge a line or control a terminal are escaped.

    Parameters:
      text: Untrusted text: of an exception, a message id, a name.
      lines: Keep line ends and tabs, for example in a traceback.
    """
    if text.isascii() and text.isprintable():
        return text
    return (_UNPRINTABLE_BUT_LINES if lines else _UNPRINTABLE).sub(_escape, text)
