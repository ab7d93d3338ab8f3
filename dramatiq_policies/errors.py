"""The exceptions of this library.

::

    Exception
    ├── PolicyError                     base class of the errors of this library
    │   ├── ConfigurationError          (also dramatiq's MiddlewareError) a declaration is wrong
    │   ├── QueueTimeoutExceeded        a message waited longer than its queue_timeout
    │   ├── HandoffFailed               the broker refused a retry, dead letter or next step
    │   ├── Crashed                     the worker died too often while running this job
    │   ├── MalformedMessage            an unreadable body or option
    │   ├── NoCurrentJob                (also a LookupError) current_job() was called outside a job
    │   ├── NoResult                    a duplicate's pipeline needs a result that was not stored
    │   ├── UnknownRecord               an idempotency store has a record of another version
    │   ├── MissingTable                the database lacks a table of dramatiq_policies
    │   └── UnreadableError             replaces a job's error whose attributes raise
    └── Verdict                         raised by a job to decide about its message
        ├── Discard
        └── Snooze
    BaseException
    └── dramatiq's TimeLimitExceeded
        └── TimeoutExceeded             the job ran longer than its timeout

If a message ends without an error of the job, ``after_discard`` receives, and the dead letter names, ``QueueTimeoutExceeded``,
``HandoffFailed`` or ``Crashed``.
"""

from __future__ import annotations

import math
import sys
from datetime import timedelta

from dramatiq.middleware import MiddlewareError, TimeLimitExceeded

from .common.credentials import redact, redacted_repr
from .common.current import running_job
from .common.durations import clamped_wait, declared_ms, format_duration, warn_of_seconds

__all__ = [
    "ConfigurationError",
    "Crashed",
    "Discard",
    "HandoffFailed",
    "MalformedMessage",
    "MissingTable",
    "NoCurrentJob",
    "NoResult",
    "PolicyError",
    "QueueTimeoutExceeded",
    "Snooze",
    "TimeoutExceeded",
    "UnknownRecord",
    "UnreadableError",
    "Verdict",
    "checked_duration",
    "checked_wait",
    "how_to_add",
    "how_to_add_once",
]


class PolicyError(Exception):
    """Base class of the errors of this library.

    Passwords in its text are masked, because tracebacks and dead letters show the text.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigurationError(PolicyError, MiddlewareError):
    """An actor's option or a middleware's argument is wrong, or two of them contradict each other.

    Raised at the declaration, at the latest when a worker boots. The class derives from ``MiddlewareError``, because Dramatiq
    swallows all other errors of a hook.
    """

    @classmethod
    def of_option(
        cls, where: str, option: str, expected: str, got: object, do: str = "", *, secret: bool = False
    ) -> ConfigurationError:
        """Return an error with the place (``"actor 'mail'"``), the option, the expected and the actual value, and advice.

        ``secret`` is for options with a URL, a client, a broker or a store: the text then names only the type of the value.
        """
        hidden = secret and not (got is None or isinstance(got, (int, float)))
        shown = f"a {type(got).__name__}" if hidden else f"{redacted_repr(got):.500}"
        message = f"{where}: {option}: expected {expected}, got {shown}"
        advice = do if not do or do.endswith(("?", ".")) else f"{do}."
        return cls(f"{message}. {advice}".rstrip())


def how_to_add(middleware: str, call: str) -> str:
    """Return a sentence on how to add a middleware: in Django's settings if django_dramatiq makes the broker."""
    if "django_dramatiq" in sys.modules:
        return f"Add {middleware} to MIDDLEWARE of DRAMATIQ_BROKER in your Django settings"
    return f"Pass one to install(): {call}"


def how_to_add_once() -> str:
    """Return a sentence against a second middleware of one kind: on Django's settings if django_dramatiq makes the broker."""
    if "django_dramatiq" in sys.modules:
        return "List each once in MIDDLEWARE of DRAMATIQ_BROKER in your Django settings"
    return "Add each once, or call install() once"


def checked_duration(where: str, option: str, value: object, *, least: int = 0, most: float = math.inf) -> int:
    """Return a declared duration in milliseconds; log a warning if the number looks like seconds.

    Raises:
      ConfigurationError: The value is no duration, or not between ``least`` and ``most`` milliseconds.
    """
    try:
        duration = declared_ms(option, value)
    except Exception:
        duration = -1
    if not least <= duration <= most:
        bound = f"at least {least}" if duration < least else f"at most {most}"
        raise ConfigurationError.of_option(where, option, f"a timedelta or milliseconds, {bound}", value)
    warn_of_seconds(where, option, value)
    return duration


def checked_wait(where: str, option: str, value: object) -> int:
    """Return a declared wait in milliseconds. Logs a warning if the wait exceeds seven days: in use, seven days is the limit.

    Raises:
      ConfigurationError: The value is no duration.
    """
    wait = checked_duration(where, option, value)
    clamped_wait(wait, "%s: %s", where, option)
    return wait


class QueueTimeoutExceeded(PolicyError):
    """A message waited in its queue longer than ``queue_timeout`` before its first run."""


class HandoffFailed(PolicyError):
    """The broker refused a retry, a deferral, a dead letter, a pipeline's next step or a group's callback."""


class Crashed(PolicyError):
    """The worker died ``max_crashes`` times while running this job; the message is quarantined."""


class MalformedMessage(PolicyError):
    """The body or an option of a message can't be read."""


class NoCurrentJob(PolicyError, LookupError):
    """``current_job()`` was called outside a job, or in a thread or greenlet that a job started."""


class NoResult(PolicyError):
    """The next step after a skipped duplicate needs the result of the first message, which was not stored."""


class UnknownRecord(PolicyError):
    """An idempotency store has a record that this version can't read. The message waits and does not run."""


class MissingTable(PolicyError):
    """The database lacks a table of dramatiq_policies. The text says how to create the table."""


class UnreadableError(PolicyError):
    """Replaces an error of a job if ``__class__`` or the chain of causes raises, so that Dramatiq and ``traceback`` fail.

    Rules for the original class do not apply; the text names that class.
    """


class Verdict(Exception):
    """Base class of `Discard` and `Snooze`. A job raises a verdict to decide about the message."""


class Discard(Verdict):
    """Raise this in a job to drop the message permanently::

        if order.is_refunded:
            raise Discard("already refunded")

    The outcome is ``discarded``, as by ``discard_on``. The text goes to the log, and with ``dead_letter_discards`` to the dead letter.
    """


class Snooze(Verdict):
    """Raise this in a job to run the message again later, without using up an attempt::

        if not bank.is_open():
            raise Snooze(timedelta(minutes=10), reason="the bank is closed")

    A job may snooze for seven days in all; set ``max_snooze`` of the `ErrorClassifier` for another limit.

    Parameters:
      delay: The wait, in milliseconds or as a ``timedelta``; at most seven days.
      reason: The reason, for the log.

    Raises:
      TypeError, ValueError: ``delay`` is no duration.
    """

    def __init__(self, delay: int | timedelta, reason: str = "") -> None:
        super().__init__(delay, reason)
        self.delay = declared_ms("delay", delay)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or f"snoozed for {format_duration(self.delay)}"


class TimeoutExceeded(TimeLimitExceeded):
    """Raised in a job at its ``timeout``. Catch it to clean up, and raise it again::

        try:
            render(report_id)
        except TimeoutExceeded:
            remove_parts(report_id)
            raise

    Like Dramatiq's interrupts, the class derives from ``BaseException``: ``except Exception`` in a job does not catch it. Without a
    rule for the class, ``unclassified`` or Dramatiq's options decide whether the job runs again.

    Attributes:
      limit_ms: The exceeded timeout, in milliseconds.
      elapsed_ms: The run time of the job until then, in milliseconds.
      actor: The actor's name.
      message_id: The message's id.
    """

    limit_ms: float | None = None
    elapsed_ms: float | None = None
    actor: str | None = None
    message_id: str | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if not args:
            self._describe()

    def _describe(self) -> None:
        # An interrupt is set by class, without arguments: read the job from the interrupted thread.
        job = running_job()
        if job is not None:
            self.limit_ms = job.timeout_ms
            self.elapsed_ms = job.elapsed_ms()
            self.actor = job.message.actor_name
            self.message_id = job.message.message_id

    def __str__(self) -> str:
        if self.args or self.limit_ms is None or self.elapsed_ms is None:
            return super().__str__()
        return (
            f"{self.actor} ran for {format_duration(self.elapsed_ms)}; its timeout is {format_duration(self.limit_ms)}"
        )


class OperationError(PolicyError):
    """A command can't do its work. The text is one sentence for the operator."""
