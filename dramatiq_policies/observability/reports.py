"""Parse the JSON reports of other processes. Unexpected values are dropped.

Another version, another program or an operator may write to the shared server. An unexpected value must not stop the alerts of a
fleet.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

__all__ = ["Report", "parse_memory", "parse_report", "parse_timed_report"]

#: The report of one process to the leader.
Report = dict[str, Any]


def parse_report(text: str | bytes) -> Report | None:
    """Parse a report and drop invalid fields. None if the text is no report."""
    return _clean(_decoded(text))


def parse_timed_report(text: str | bytes) -> tuple[float, Report] | None:
    """Parse (publish time in ms since the epoch, report). None if the text is no timed report."""
    found = _decoded(text)
    if not isinstance(found, list) or len(found) != 2 or not _is_number(found[0]):
        return None
    report = _clean(found[1])
    return None if report is None else (found[0], report)


def parse_memory(text: str | bytes) -> list[list[str]] | None:
    """Parse a list of name pairs and drop invalid pairs. None if the text is no list."""
    found = _decoded(text)
    if not isinstance(found, list):
        return None
    return [pair for pair in found if isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair))]


def _decoded(text: str | bytes) -> Any:
    # Also for invalid UTF-8 and too deep nesting.
    with suppress(ValueError, TypeError, RecursionError):
        return json.loads(text)
    return None


def _clean(found: object) -> Report | None:
    if not isinstance(found, dict):
        return None
    report: Report = {name: value for name, value in found.items() if _is_text(value) or _is_number(value)}
    for name in ("threads", "busy"):
        if name in report and not _is_number(report[name]):
            del report[name]
    for name, fits in (("taken", _is_taken), ("held", _is_number)):
        if isinstance(found.get(name), dict):
            report[name] = {queue: value for queue, value in found[name].items() if fits(value)}
        else:
            report.pop(name, None)
    return report


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63  # Not NaN either.


def _is_taken(value: object) -> bool:
    """Return whether the value is [message id, ready time or None]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_text(value[0])
        and (value[1] is None or _is_number(value[1]))
    )
