"""Check received messages of any sender: reject unreadable messages, and drop unusable options."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from dramatiq import Message

from ..common.durations import WEEK_MS, warn_of_seconds_once
from ..common.safe_logger import SafeLogger
from ..errors import MalformedMessage

#: The default of ``max_body_bytes``.
MAX_BODY_BYTES = 16_000_000

__all__ = [
    "MAX_BODY_BYTES",
    "check_composition",
    "check_shape",
    "clean_options",
    "decode",
    "redacted_repr",
    "without_stack",
]

logger = SafeLogger("dramatiq_policies.outcomes")

_REQUIRED = {"queue_name": str, "actor_name": str, "args": (list, tuple), "kwargs": dict, "options": dict}
_ALLOWED: dict[str, Any] = {**_REQUIRED, "message_id": str, "message_timestamp": (int, float)}


def decode(body: bytes, most: int | None = MAX_BODY_BYTES) -> Message[Any]:
    """Decode a body of at most ``most`` bytes. The decoded form of a larger body might not fit into memory.

    Raises:
      MalformedMessage: The body is too long.
      dramatiq.DecodeError: The encoder cannot read the body.
    """
    if most is not None and len(body) > most:
        raise MalformedMessage(f"the body has {len(body)} bytes, and max_body_bytes is {most}")
    return Message.decode(body)


def check_shape(message: Message[Any]) -> None:
    """Check that every field has the expected type.

    Raises:
      MalformedMessage: A field has another type.
    """
    if not (
        type(message.options) is dict
        and type(message.message_id) is str
        and type(message.actor_name) is str
        and type(message.queue_name) is str
        and type(message.kwargs) is dict
        and is_number(message.message_timestamp)
    ):
        raise MalformedMessage("a field of the message has the wrong type")


def check_composition(options: dict[str, Any]) -> None:
    """Check the messages that must be published after the job.

    Raises:
      MalformedMessage: ``pipe_target`` or a callback of the group is no message.
    """
    target = options.get("pipe_target")
    if target is not None:
        _check_nested(target, "pipe_target")
    callbacks = options.get("group_completion_callbacks")
    if callbacks is not None:
        if not isinstance(callbacks, list) or not isinstance(options.get("group_completion_uuid"), str):
            raise MalformedMessage("group_completion_callbacks: expected a list of messages and the group's uuid")
        for callback in callbacks:
            _check_nested(callback, "group_completion_callbacks")


def _check_nested(data: object, option: str) -> None:
    # Each step of a pipeline contains the next. A loop, because a hostile pipeline may be deeper than the stack.
    while data is not None:
        if not isinstance(data, dict) or not _ALLOWED.keys() >= data.keys() >= _REQUIRED.keys():
            raise MalformedMessage(f"{option}: expected a message, got {redacted_repr(data)}")
        for name, value in data.items():
            if not isinstance(value, _ALLOWED[name]):
                raise MalformedMessage(f"{option}: {name} has the wrong type: {redacted_repr(value)}")
        data = data["options"].get("pipe_target")


def is_number(value: object) -> bool:
    """Whether the value is a finite number and not a bool."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def redacted_repr(value: object) -> str:
    """Format a value of a message for a log: a number in full, otherwise only the type, as the value may be a secret."""
    return f"{value!r:.100}" if value is None or isinstance(value, (int, float)) else f"<{type(value).__name__}>"


def _is_wait(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 10**15


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_name(value: object) -> bool:
    return value is None or type(value) is str


#: By name, the options of Dramatiq's own middleware that a message may carry: whether a value is valid.
_ACCEPTS: dict[str, Callable[[Any], bool]] = {
    "throws": lambda value: False,
    "retries": _is_count,
    "max_retries": lambda value: value is None or (type(value) is int and value < 2**53),
    "min_backoff": _is_wait,
    "max_backoff": _is_wait,
    "max_age": lambda value: value is None or _is_wait(value),
    "result_ttl": lambda value: _is_wait(value) and value > 0,
    "broker_priority": lambda value: value is None or (type(value) is int and 0 <= value <= 255),
    "on_failure": _is_name,
    "on_success": _is_name,
    "on_retry_exhausted": _is_name,
    "ready_at": _is_wait,
    # Dramatiq runs a message with another invalid value at once, and logs that; a message due at infinity would never run.
    "eta": lambda value: type(value) is not float or math.isfinite(value),
}
_CHECKED = frozenset(_ACCEPTS)
_BACKOFFS = frozenset({"min_backoff", "max_backoff"})
_warned: set[tuple[str, str]] = set()


def clean_options(message: Message[Any]) -> None:
    """Remove options with unusable values. Logs a warning once per actor and option."""
    options = message.options
    for name in _CHECKED.intersection(options):
        if not _ACCEPTS[name](options[name]):
            _warn_once(message.actor_name, name, options.pop(name), "is invalid and ignored")
        elif name in _BACKOFFS and options[name] > WEEK_MS:
            # Dramatiq shortens the wait in silence.
            _warn_once(message.actor_name, name, options[name], "exceeds 7 days: the wait is 7 days")


def _warn_once(actor_name: str, option: str, value: object, what: str) -> None:
    if (actor_name, option) not in _warned and len(_warned) < 1_000:
        _warned.add((actor_name, option))
        logger.warning("A message for actor %r: the option %s=%s %s.", actor_name, option, redacted_repr(value), what)


#: The options of a message that hold milliseconds.
_DURATIONS = frozenset({"timeout", "time_limit", "max_age", "min_backoff", "max_backoff", "result_ttl"})


def timedeltas_to_ms(message: Message[Any]) -> None:
    """Turn each ``timedelta`` in a message's options into milliseconds, since a message is JSON.

    Logs a warning if another duration looks like seconds: once per actor and option. A ``delay`` is not checked: Dramatiq has
    turned a ``timedelta`` into a number before.
    """
    options = message.options
    for name, value in options.items():
        if isinstance(value, timedelta):
            options[name] = round(value.total_seconds() * 1_000)
        elif name in _DURATIONS:
            warn_of_seconds_once(f"A message for actor {message.actor_name!r}", name, value)


def without_stack(error: MalformedMessage) -> MalformedMessage:
    """Return a copy of the error without the stack. The frames of the stack are ours and hold the message."""
    # Sentry reads `sys.exc_info()`. Before Python 3.11 that keeps the stack of an error in an except block.
    return MalformedMessage(*error.args)
