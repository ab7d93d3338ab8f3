"""The kinds of findings of the production gate, each with a stable code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["CODES", "Code", "Finding"]

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Code:
    """A kind of finding.

    Attributes:
      code: The stable code.
      severity: An error fails the gate, a warning only with ``strict``.
      title: The fault in a few words.
      fix: The remedy.
    """

    code: str
    severity: Severity
    title: str
    fix: str


def _codes(*codes: Code) -> Mapping[str, Code]:
    return {code.code: code for code in codes}


CODES: Mapping[str, Code] = _codes(
    # The design of an actor.
    Code("DP001", "error", "nothing is retried", "Declare retry_on for the transient errors; retry_on=() if there are none"),
    Code("DP002", "error", "nothing is discarded", "Declare discard_on for the permanent errors; discard_on=() if there are none"),
    Code("DP003", "error", "retries have no limit", "Set max_retries, or ErrorClassifier(unclassified=RetryPolicy(…))"),
    Code("DP004", "error", "no timeout", "Declare timeout=, or Timeout(default=…) for the whole broker"),
    Code("DP005", "error", "on the default queue", "Declare queue_name: a queue for jobs that may wait behind each other"),
    Code("DP006", "error", "nothing makes a second run harmless", "Declare idempotency_key, idempotent=True or done_when; or exempt the actor, with the reason why a second run is harmless"),
    Code("DP007", "error", "no purpose", "Describe the purpose of the job in a docstring"),
    Code("DP008", "error", "a required tag is missing", "Declare the tag in tags="),
    # Contradictions.
    Code("DP009", "error", "the lease is short, and shorter than the timeout", "Leave Idempotency(lease=…) at the default of 60 seconds, or set it above the timeout"),
    Code("DP010", "error", "retries outlive the idempotency memory", "Raise idempotency_ttl above the longest time of retries"),
    Code("DP011", "error", "a rule can never match", "Remove the rule, or narrow the rule before it by when()"),
    Code("DP012", "error", "a broker's rule wins over the actor's wider one", "Name the class on the actor too, or set broker_rules=False"),
    Code("DP013", "error", "a middleware of Dramatiq stands beside ours", "Remove this middleware from the broker"),
    Code("DP014", "error", "names an actor that does not exist", "Import the module that declares the actor, or correct the name"),
    Code("DP015", "error", "the timeout is longer than the worker's shutdown timeout", "Shorten the timeout, or raise --worker-shutdown-timeout (of dramatiq and of check)"),
    Code("DP016", "error", "a Meta has lost its base's options", "Repeat the options: Dramatiq reads only the names in the class's own Meta"),
    Code("DP017", "error", "the timeout is longer than RabbitMQ's consumer_timeout", "Shorten the timeout, or raise consumer_timeout (of the server and of check)"),
    Code("DP018", "warning", "alerts reach nobody", "Add SentryReporter or on_outcome=, or a log handler for dramatiq_policies.alerts"),
    Code("DP019", "warning", "a queue without a threshold", "Set a threshold: QueueMonitor(thresholds={…})"),
    Code("DP020", "error", "an async actor without AsyncIO", "Add dramatiq.middleware.AsyncIO to the broker"),
    Code("DP021", "error", "an extra is not installed", "Install the extra"),
    Code("DP022", "error", "dramatiq_policies is not on the broker", "Call install(broker) before the actors are declared; in Django, list its middleware in MIDDLEWARE of DRAMATIQ_BROKER"),
    Code("DP023", "error", "a rule's class can't be imported", "Correct the dotted path"),
    Code("DP024", "error", "idempotency records stay within a process", "Pass Idempotency(RedisStore.from_url(…))"),
    Code("DP025", "warning", "a subclass of a Dramatiq middleware is not replaced", "Derive the class from ours, in dramatiq_policies.middleware.composition and .shutdown"),
    Code("DP026", "warning", "retries go on for more than a day", "Limit them: ErrorClassifier(unclassified=RetryPolicy(attempts=5)), fewer attempts or max_elapsed="),
    Code("DP027", "warning", "a duration that looks like seconds", "Durations are milliseconds: write timedelta(seconds=30) or 30_000"),
    Code("DP028", "error", "a group's callback without GroupCallbacks", "Add dramatiq.middleware.GroupCallbacks(rate_limiter_backend) to the broker"),
    Code("DP029", "error", "results are read without Results", "Add dramatiq.results.Results(backend=…) to the broker, and store_results=True to the actor"),
    Code("DP030", "warning", "a later step of a pipeline has no key", "Declare idempotency_key on each step"),
    Code("DP031", "warning", "an outbox without a threshold", "Set a threshold: QueueMonitor(outbox=Threshold(oldest=…))"),
    # Findings of check --live.
    Code("DP101", "error", "Redis may evict messages", "Set maxmemory-policy noeviction"),
    Code("DP102", "error", "Redis keeps nothing on disk", "Set appendonly yes"),
    Code("DP103", "warning", "Redis loses writes since its last snapshot", "Set appendonly yes"),
    Code("DP104", "error", "the clocks differ", "Synchronise the clocks"),
    Code("DP105", "error", "a queue has other arguments than the application declares", "Move the messages, delete the queue, and start a worker to declare it again"),
    Code("DP106", "warning", "the application's sends are not confirmed", "Set RabbitmqBroker(confirm_delivery=True)"),
    Code("DP107", "warning", "no heartbeats", "Leave the option heartbeat out, or set it to 60"),
    Code("DP108", "warning", "dead letters are kept for less than a day", "Raise dead_message_ttl, or the environment's dramatiq_dead_message_ttl"),
    Code("DP109", "error", "Redis is a replica", "Connect to the primary"),
    Code("DP110", "error", "the idempotency store may forget", "Follow the text of the finding"),
    Code("DP111", "error", "two services share idempotency keys", "Set namespace=… of the store, a different one for each service"),
    Code("DP112", "error", "a table of dramatiq_policies is missing", "Create the tables when you deploy"),
    Code("DP113", "warning", "messages wait in the outbox, and no relay publishes them", "Run workers, or dramatiq-policies outbox relay; look at dramatiq-policies outbox list"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A finding on an actor, a broker or a server.

    Attributes:
      code: The kind, a key of `CODES`.
      severity: ``error`` or ``warning``.
      actor: The actor; None for a broker or a server.
      message: The fault with its figures.
      fix: The remedy.
      file, line: The place of the actor's declaration; None if unknown.
      exempt: The reason of an exemption; None if the finding counts.
    """

    code: str
    severity: Severity
    actor: str | None
    message: str
    fix: str
    file: str | None = None
    line: int | None = None
    exempt: str | None = None

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
