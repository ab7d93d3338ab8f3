"""The exceptions of this library.

::

    Exception
    ├── PolicyError                     everything of ours that is an error
    │   ├── ConfigurationError          (also dramatiq's MiddlewareError) a declaration is wrong
    │   ├── QueueTimeoutExceeded        a message waited longer than its queue_timeout
    │   ├── HandoffFailed               the broker would not take a retry, dead letter or next stage
    │   ├── Crashed                     the worker died in this job too often
    │   ├── MalformedMessage            a body or option that can't be read
    │   ├── NoCurrentJob                (also a LookupError) current_job() was called outside a job
    │   ├── NoResult                    a duplicate's pipeline needs a result that nobody stored
    │   ├── UnknownRecord               an idempotency store holds what this version can't read
    │   └── UnreadableError             stands in for a job's error whose own attributes raise
    └── Verdict                         raised by a job, says what is to become of it
        ├── Discard
        └── Snooze
    BaseException
    └── dramatiq's TimeLimitExceeded
        └── TimeoutExceeded             the job ran longer than its timeout

The stand-ins (``QueueTimeoutExceeded``, ``HandoffFailed``, ``Crashed``) are what ``after_discard`` receives and what a
dead letter names when no error of the job's own explains its end.
"""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from typing import Any

from dramatiq.middleware import MiddlewareError, TimeLimitExceeded

from .common.credentials import redact, redacted_repr
from .common.current import running_job
from .common.durations import clamped_wait, to_ms, warn_of_seconds

__all__ = [
    "ConfigurationError",
    "Crashed",
    "Discard",
    "HandoffFailed",
    "MalformedMessage",
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
]


class PolicyError(Exception):
    """Base class of the errors that this library raises or puts in place of a job's own.

    Passwords in its text are masked: Python prints it where the application is imported, and a dead letter carries it.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigurationError(PolicyError, MiddlewareError):
    """A declaration is wrong: an actor's option, a middleware's argument, or their combination.

    Raised where the mistake is made, at declaration or at the latest when a worker boots. It is a
    ``MiddlewareError``, since those are the only errors that Dramatiq lets out of a hook.
    """

    @classmethod
    def of_option(
        cls, where: str, option: str, expected: str, got: Any, do: str = "", *, secret: bool = False
    ) -> ConfigurationError:
        """An error that names the place (``"actor 'mail'"``), the option, what was expected, what came, what to do.

        ``secret`` is for an option that takes a URL, a client, a broker or a store: of what came only the type is shown.
        """
        hidden = secret and not (got is None or isinstance(got, (int, float)))
        shown = f"a {type(got).__name__}" if hidden else f"{redacted_repr(got):.500}"
        message = f"{where}: {option}: expected {expected}, got {shown}"
        return cls(f"{message}. {do}" if do else f"{message}.")


def how_to_add(middleware: str, call: str) -> str:
    """A sentence on how to put a middleware on the broker: in Django's settings where django_dramatiq makes the broker."""
    if "django_dramatiq" in sys.modules:
        return f"Add {middleware} to MIDDLEWARE of DRAMATIQ_BROKER in your Django settings"
    return f"Pass one to install(): {call}"


def checked_duration(where: str, option: str, value: Any, *, least: int = 0, most: float = math.inf) -> int:
    """A declared duration in milliseconds.

    Raises:
      ConfigurationError: It is none, or shorter than ``least`` or longer than ``most`` milliseconds.
    """
    try:
        duration = to_ms(value)
    except Exception:
        duration = -1
    if not least <= duration <= most:
        bound = f"at least {least}" if duration < least else f"at most {most}"
        raise ConfigurationError.of_option(where, option, f"milliseconds of {bound}, or a timedelta", value)
    warn_of_seconds(where, option, value)
    return duration


def checked_wait(where: str, option: str, value: Any) -> int:
    """A declared wait in milliseconds. A wait of more than 7 days stays as declared, and a warning says what it comes to.

    Raises:
      ConfigurationError: The value is no duration.
    """
    wait = checked_duration(where, option, value)
    clamped_wait(wait, f"{where}: {option}")
    return wait


class QueueTimeoutExceeded(PolicyError):
    """A message waited in its queue for longer than ``queue_timeout`` before its first run."""


class HandoffFailed(PolicyError):
    """The broker did not accept a retry, a deferral, a dead letter, a next stage or a group's callback."""


class Crashed(PolicyError):
    """The worker died in this job ``max_crashes`` times; the message is quarantined."""


class MalformedMessage(PolicyError):
    """A message whose body, shape or composition can't be read."""


class NoCurrentJob(PolicyError, LookupError):
    """``current_job()`` was called where no job runs: outside a worker, or in a thread or greenlet that a job started."""


class NoResult(PolicyError):
    """A skipped duplicate's next stage needs its twin's result, and nobody stored it."""


class UnknownRecord(PolicyError):
    """An idempotency store holds a record that this version can't read; the message waits, it is not run."""


class UnreadableError(PolicyError):
    """Stands in for an error of a job that neither Dramatiq nor ``traceback`` can read: its ``__class__`` or its chain of
    causes raises. Rules for the error's own class do not apply to it; its text names that class."""


class Verdict(Exception):
    """Base class of what a job raises to say itself what becomes of its message."""


class Discard(Verdict):
    """Raise it in a job to drop the message for good: ``raise Discard("already refunded")``."""


class Snooze(Verdict):
    """Raise it in a job to put the message back for a while without using up an attempt.

    Parameters:
      delay: How long, in milliseconds, or a ``timedelta``.
      reason: Why, for the logs.

    Raises:
      TypeError, ValueError: If the delay is no duration.
    """

    def __init__(self, delay: int | timedelta, reason: str = "") -> None:
        super().__init__(delay, reason)
        self.delay = to_ms(delay)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason or f"snoozed for {self.delay} ms"


class TimeoutExceeded(TimeLimitExceeded):
    """Raised in a job that ran for longer than its ``timeout``.

    Like Dramatiq's own interrupts it is no ``Exception``, so that ``except Exception`` in a job does not swallow it.

    Attributes:
      limit_ms: The timeout that was exceeded, in milliseconds.
      elapsed_ms: How long the job had run, in milliseconds.
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
        # An interrupt is set by class, without arguments; the interrupted thread knows which job it runs.
        job = running_job()
        if job is not None:
            self.limit_ms = job.timeout_ms
            self.elapsed_ms = job.elapsed_ms()
            self.actor = job.message.actor_name
            self.message_id = job.message.message_id

    def __str__(self) -> str:
        if self.args or self.limit_ms is None or self.elapsed_ms is None:
            return super().__str__()
        return f"{self.actor} ran for {self.elapsed_ms:.0f} ms; its timeout is {self.limit_ms:.0f} ms"


class OperationError(PolicyError):
    """A command cannot do its work. The text is one sentence for the operator."""
