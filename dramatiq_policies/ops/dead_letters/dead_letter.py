"""Dead letters as records, from dramatiq_policies and from plain Dramatiq."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.message import generate_unique_id

from ...common.clock import now_ms
from ...common.texts import printable
from ...delivery.broker_state import state_of
from ...delivery.delivery import READY_AT
from ...delivery.groups import group_of
from ...delivery.history import FAILURE, POLICIES, History
from ...delivery.validation import check_shape, decode, is_number

if TYPE_CHECKING:
    from dramatiq.broker import Broker

    from ...brokers.browser import Item

__all__ = ["DeadLetter", "Filter", "for_replay", "read_dead_letter"]

#: The options that a message must not carry into a replay.
PAST = frozenset({"eta", FAILURE, POLICIES, READY_AT, "redis_message_id", "requeue_timestamp", "retries", "traceback"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A dead letter. Unknown values are None.

    Attributes:
      queue: The queue of the message.
      message_id, actor: From the message; None if the body is unreadable.
      outcome, reason, exception, text, traceback, attempts, history: From the option ``failure``. A dead letter of
        plain Dramatiq has only a traceback.
      failed_at: The time of the last failure, in ms since the epoch.
      replays: The number of earlier replays.
      tags: The actor's tags.
      message: The message; None if the body is unreadable.
    """

    queue: str
    message_id: str | None
    actor: str | None
    outcome: str
    reason: str | None
    exception: str | None
    text: str | None
    traceback: str | None
    attempts: int | None
    failed_at: int | None
    replays: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    message: Message[Any] | None = None

    @property
    def group(self) -> str | None:
        """The id of the group whose completion callback waits for this message, or None."""
        return None if self.message is None else group_of(self.message.options)

    def row(self) -> dict[str, Any]:
        """Return the fields for a list."""
        names = ("queue", "message_id", "actor", "outcome", "reason", "exception", "text", "attempts", "failed_at")
        return {**{name: getattr(self, name) for name in names}, "replays": self.replays, "tags": dict(self.tags)}

    def asdict(self, *, args: bool = False) -> dict[str, Any]:
        """Return all fields; arguments as types only, unless ``args`` is true."""
        message = self.message
        shown: dict[str, Any] = {"args": None, "kwargs": None, "options": None}
        if message is not None:
            mask = _itself if args else _type_of
            shown = {
                "args": [mask(value) for value in message.args],
                "kwargs": {name: mask(value) for name, value in message.kwargs.items()},
                "options": {name: value for name, value in message.options.items() if name not in PAST},
            }
            if not args and shown["options"]:
                shown["options"] = {
                    name: value if isinstance(value, (int, float, bool)) else _type_of(value)
                    for name, value in shown["options"].items()
                }
        return {**self.row(), "group": self.group, "traceback": self.traceback, "history": list(self.history), **shown}


def _itself(value: object) -> Any:
    return value


def _type_of(value: object) -> str:
    return f"<{type(value).__name__}>"


def read_dead_letter(broker: Broker, queue: str, item: Item) -> DeadLetter:
    """Read a dead letter. Unreadable parts are None: any program may have written it."""
    try:
        message = decode(item.body, state_of(broker).settings.max_body_bytes)
        check_shape(message)
    except Exception:
        return DeadLetter(
            queue=queue,
            message_id=None,
            actor=None,
            outcome="dead",
            reason="malformed",
            exception=None,
            text=item.body[:200].decode(errors="replace"),
            traceback=None,
            attempts=None,
            failed_at=item.at_ms,
        )
    options = message.options
    failure = options.get(FAILURE)
    failure = failure if isinstance(failure, dict) else _stock_failure(options)
    policy = state_of(broker).policies.get(message.actor_name)
    tags = failure.get("tags")
    history = failure.get("history")
    failed_at: Any = failure.get("failed_at")
    return DeadLetter(
        queue=queue,
        message_id=message.message_id,
        actor=message.actor_name,
        outcome=_text(failure.get("outcome")) or "dead",
        reason=_text(failure.get("reason")),
        exception=_text(failure.get("exception")),
        text=_text(failure.get("message")),
        traceback=_text(failure.get("traceback")),
        attempts=failure["attempts"] if type(failure.get("attempts")) is int else None,
        failed_at=int(failed_at) if is_number(failed_at) else item.at_ms,
        replays=History(options).replays,
        tags=tags if isinstance(tags, dict) else ((policy.tags or {}) if policy is not None else {}),
        history=tuple(run for run in history if isinstance(run, dict)) if isinstance(history, list) else (),
        message=message,
    )


def _stock_failure(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the traceback that plain Dramatiq leaves: the traceback of the last failure but one."""
    trace = _text(options.get("traceback"))
    retries = options.get("retries")
    found: dict[str, Any] = {"traceback": trace, "attempts": retries + 1 if type(retries) is int else None}
    last = trace.strip().splitlines()[-1] if trace and trace.strip() else ""
    name, _, text = last.partition(": ")
    if name and name.replace(".", "").isidentifier():
        found.update(exception=name, message=text)
    return found


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def for_replay(message: Message[Any], queue: str, *, new_id: bool = False) -> Message[Any]:
    """Return the message for a replay: without history, with the present time and one more replay.

    The number of replays is part of the run's identity, so that the record of the earlier run does not stop the replay.
    """
    options = {name: value for name, value in message.options.items() if name not in PAST}
    options[POLICIES] = {"replays": History(message.options).replays + 1}
    return Message(
        queue_name=queue,
        actor_name=message.actor_name,
        args=message.args,
        kwargs=message.kwargs,
        options=options,
        message_id=generate_unique_id() if new_id else message.message_id,
        message_timestamp=now_ms(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """A filter on dead letters. All given conditions must hold.

    Attributes:
      actor, outcome, reason: The exact value.
      error: A class by its dotted path or bare name, or any part of ``path: text``, in any case.
      tags: Names and values.
      message_ids: Accepted ids, also with control characters escaped as ``dead list`` prints them.
      older_than_ms, newer_than_ms: The time since the last failure.
      arguments: Names of arguments and their values as text or JSON; ``order.id`` reads a key of an object, ``0`` is
        the first positional argument.
      parameters: The names of each actor's parameters, for arguments by position.
    """

    actor: str | None = None
    outcome: str | None = None
    reason: str | None = None
    error: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    message_ids: tuple[str, ...] = ()
    older_than_ms: int | None = None
    newer_than_ms: int | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, dead_letter: DeadLetter) -> bool:
        return all(self._tests(dead_letter))

    def _tests(self, dead_letter: DeadLetter) -> Iterator[bool]:
        for name in ("actor", "outcome", "reason"):
            wanted = getattr(self, name)
            yield wanted is None or wanted == getattr(dead_letter, name)
        if self.error is not None:
            yield self.error.lower() in f"{dead_letter.exception or ''}: {dead_letter.text or ''}".lower()
        yield all(dead_letter.tags.get(name) == value for name, value in self.tags.items())
        yield not self.message_ids or bool(
            {dead_letter.message_id, printable(dead_letter.message_id or "")} & {*self.message_ids}
        )
        age = None if dead_letter.failed_at is None else now_ms() - dead_letter.failed_at
        yield self.older_than_ms is None or (age is not None and age >= self.older_than_ms)
        yield self.newer_than_ms is None or (age is not None and age <= self.newer_than_ms)
        if self.arguments:
            given = _arguments_of(dead_letter, self.parameters)
            yield all(_is_given(given, name, text) for name, text in self.arguments.items())


_NONE = object()


def _arguments_of(dead_letter: DeadLetter, parameters: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    message = dead_letter.message
    if message is None:
        return {}
    names = parameters.get(message.actor_name, ())
    by_place = {str(place): value for place, value in enumerate(message.args)}
    return {**by_place, **dict(zip(names, message.args, strict=False)), **message.kwargs}


def argument_names(dead_letter: DeadLetter, where: Filter) -> Iterator[str]:
    """Yield the names of a dead letter's arguments, and ``order.id`` for each key of an object."""
    for name, value in _arguments_of(dead_letter, where.parameters).items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{key}" for key in value)


def _is_given(arguments: Mapping[str, Any], name: str, text: str) -> bool:
    value: Any = arguments
    for part in [name] if name in arguments else name.split("."):
        value = value.get(part, _NONE) if isinstance(value, Mapping) else _NONE
    if value is _NONE:
        return False
    if str(value) == text:
        return True
    try:
        parsed = json.loads(text)
    except ValueError:
        return False
    return type(parsed) is type(value) and bool(parsed == value)
