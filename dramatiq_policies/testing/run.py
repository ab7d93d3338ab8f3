"""The record of a `drain`."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..common.durations import format_duration
from ..common.plurals import counted
from ..outcomes import Outcome, OutcomeEvent, text_of
from .metrics import values_of

if TYPE_CHECKING:
    from dramatiq import Actor
    from dramatiq.broker import MessageProxy

    from ..middleware.metrics import Metrics

__all__ = ["Run"]

#: The longest text of a message's arguments in a transcript, in characters.
_WIDTH = 100


class Entry:
    """A delivery: its end in virtual ms since the start, and its event; None if the worker died."""

    __slots__ = ("at", "event", "message", "note")

    def __init__(self, at: int, event: OutcomeEvent | None, message: MessageProxy | None, note: str = "") -> None:
        self.at = at
        self.event = event
        self.message = message
        self.note = note

    def __str__(self) -> str:
        event = self.event
        call = "?" if self.message is None else f"{self.message.actor_name}({_arguments(self.message)})"
        if event is None:
            return f"+{format_duration(self.at)}  {call}  {self.note}"
        error = (
            "" if event.exception is None else f": {type(event.exception).__name__}: {text_of(event.exception, 200)}"
        )
        return "".join(
            [
                f"+{format_duration(self.at)}  {call}",
                "" if event.attempt is None else f"  attempt {event.attempt}",
                f"  {event.outcome.value}",
                "" if event.reason is None else f" ({event.reason})",
                error,
                "" if event.delay_ms is None else f", again in {format_duration(event.delay_ms)}",
            ]
        )


class Run:
    """The record of a `drain`. Its ``repr`` is a transcript with a line for each delivery::

        with fail(send_confirmation, EmailTimeout):
            send_confirmation.send(42, "ada@example.com")
            run = drain(broker)
        run.assert_outcomes(send_confirmation, "retried", "succeeded")
        run.assert_nothing_dead()

    Methods accept an actor or its name; None means all actors.

    Attributes:
      elapsed: The virtual time of the drain, in milliseconds.
      events: The `OutcomeEvent` of each delivery, in order. A crashed worker leaves no event.
      dead: The new dead letters; ``message.options["failure"]`` has the reason.
      metrics: The values that Metrics would send, by name, also without Metrics on the broker: sums of counters (0 if
        missing), and lists of durations and waits in ms.
      logs: The log records of failed messages: from DiscardLogger, and alerts.
    """

    def __init__(self, actors: Iterable[str] = (), metrics: Metrics | None = None) -> None:
        self.elapsed = 0
        self.dead: list[MessageProxy] = []
        self._metrics = metrics
        self.logs: list[logging.LogRecord] = []
        self.entries: list[Entry] = []
        self._actors = set(actors)

    @property
    def metrics(self) -> dict[str, Any]:
        return values_of(self.events, self._metrics)

    def note_actors(self, actors: Iterable[str]) -> None:
        """Add actors that a job has declared."""
        self._actors |= set(actors)

    @property
    def events(self) -> list[OutcomeEvent]:
        return [entry.event for entry in self.entries if entry.event is not None]

    def outcomes(self, actor: Actor[..., Any] | str | None = None) -> list[str]:
        """Return the outcome of each delivery, in order: ``["retried", "succeeded"]``.

        Raises:
          ValueError: There is no such actor.
        """
        return [event.outcome.value for event in self._of(actor)]

    def reasons(self, actor: Actor[..., Any] | str | None = None) -> list[str | None]:
        """Return the reason of each outcome, in order; None for an outcome without reasons."""
        return [event.reason for event in self._of(actor)]

    def waits(self, actor: Actor[..., Any] | str | None = None) -> list[int]:
        """Return the wait of each retried or deferred delivery, in ms, in order."""
        return [event.delay_ms for event in self._of(actor) if event.delay_ms is not None]

    def assert_outcomes(self, actor: Actor[..., Any] | str | None, *expected: str | Outcome) -> None:
        """Fail unless the deliveries ended so, in this order.

        Raises:
          AssertionError: The outcomes differ; the text has the transcript.
        """
        __tracebackhide__ = True
        wanted = [str(outcome) for outcome in expected]
        got = self.outcomes(actor)
        if got != wanted:
            self._fail(f"{_name(actor)}: expected {_listed(wanted)}, got {_listed(got)}.")

    def assert_waits(self, actor: Actor[..., Any] | str | None, *expected: int, jitter: float = 0.0) -> None:
        """Fail unless the waits equal these, in ms, or exceed them by at most the share ``jitter``.

        Raises:
          AssertionError: The waits differ; the text has the transcript.
        """
        __tracebackhide__ = True
        got = self.waits(actor)
        if len(got) != len(expected) or not all(
            wanted <= ms <= wanted * (1 + jitter) for ms, wanted in zip(got, expected, strict=True)
        ):
            more = f" (each may be longer by {jitter:.0%})" if jitter else ""
            self._fail(f"{_name(actor)}: expected the waits {list(expected)} ms{more}, got {got} ms.")

    def assert_dead(self, actor: Actor[..., Any] | str | None, *reasons: str | None) -> None:
        """Fail unless the actor's dead letters carry these reasons (None where the outcome has but one), in order.

        Raises:
          AssertionError: The reasons differ; the text has the transcript.
        """
        __tracebackhide__ = True
        name = self._known(actor)
        got = [
            dead_letter.options.get("failure", {}).get("reason")
            for dead_letter in self.dead
            if name is None or dead_letter.actor_name == name
        ]
        if got != list(reasons):
            self._fail(f"{_name(actor)}: expected dead letters with the reasons {list(reasons)}, got {got}.")

    def assert_nothing_dead(self) -> None:
        """Fail if a message went to the dead letters.

        Raises:
          AssertionError: There is a dead letter; the text has the transcript.
        """
        __tracebackhide__ = True
        if self.dead:
            self._fail(f"expected no dead letters, got {len(self.dead)}.")

    def _fail(self, text: str) -> None:
        __tracebackhide__ = True
        raise AssertionError(f"{text}\n{self!r}")

    def _of(self, actor: Actor[..., Any] | str | None) -> list[OutcomeEvent]:
        name = self._known(actor)
        return [event for event in self.events if name is None or event.actor == name]

    def _known(self, actor: Actor[..., Any] | str | None) -> str | None:
        if actor is None:
            return None
        name = actor if isinstance(actor, str) else actor.actor_name
        known = self._actors | {event.actor for event in self.events if event.actor is not None}
        if name not in known:
            # A reader would take an empty list for "did not run".
            if not isinstance(actor, str):
                raise ValueError(
                    f"The drained broker has no actor {name!r}: it is declared on another broker. Drain that broker, or call "
                    "set_broker() before you declare the actor."
                )
            like = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {like[0]!r}?" if like else f" It has {', '.join(sorted(known)) or 'none'}."
            raise ValueError(f"The broker has no actor {name!r}.{hint}")
        return name

    def __repr__(self) -> str:
        lines = "".join(f"\n  {entry}" for entry in self.entries) or "\n  nothing was queued"
        count = counted(len(self.entries), "delivery", "deliveries")
        return f"<Run: {count} in {format_duration(self.elapsed)}>{lines}"


def _arguments(message: MessageProxy) -> str:
    parts = [f"{value!r}" for value in message.args] + [f"{name}={value!r}" for name, value in message.kwargs.items()]
    text = ", ".join(parts)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _name(actor: Actor[..., Any] | str | None) -> str:
    return "all actors" if actor is None else actor if isinstance(actor, str) else actor.actor_name


def _listed(outcomes: list[str]) -> str:
    return ", ".join(outcomes) if outcomes else "no delivery"
