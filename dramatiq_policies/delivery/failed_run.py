"""Decide about a failed job: retry, discard, alert, or dead-letter the message.

`ErrorClassifier` calls `decide`; `settlement` carries out the decision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import Retries, Shutdown

from .. import _dramatiq
from .._job_errors import is_a, quietly
from ..common.clock import now_ms
from ..common.durations import LikelySeconds, clamped_wait, warn_of_seconds_once
from ..common.texts import encodable
from ..errors import Snooze, Verdict
from ..outcomes import Outcome, logger, text_of
from ..rules.rule import RetryPolicy, Verb
from ..rules.verdicts import deciding_rule
from ..rules.wait import safe_wait
from .callbacks import add_exhausted_callback
from .decision import Decision
from .delivery import Delivery
from .history import POLICIES, History, retries_of
from .outgoing import OutgoingMessage, Recorder
from .tracebacks import traceback_of

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy

    from .actor_policy import ActorPolicy

__all__ = ["BrokerDefaults", "FailedRun", "decide"]

_UNCLASSIFIED = "unclassified"
#: The wait, in milliseconds, after a `Snooze` with an unreadable delay.
_UNREADABLE_SNOOZE = 15_000


class BrokerDefaults(NamedTuple):
    """The settings for all actors of a broker, documented at `ErrorClassifier`."""

    stock: Retries
    unclassified: RetryPolicy | None
    max_attempts: int
    max_snooze: int
    dead_letter_discards: bool


class FailedRun:
    """One run of a job, ended by ``error``."""

    __slots__ = ("broker", "delivery", "error", "history", "message", "policy")

    def __init__(
        self, broker: Broker, delivery: Delivery, policy: ActorPolicy, message: MessageProxy, error: BaseException
    ) -> None:
        self.broker = broker
        self.delivery = delivery
        self.policy = policy
        self.message = message
        self.error = error
        self.history = History(message.options)

    def add_next_run(self, delay_ms: int = 0) -> None:
        """Add the message of the next run to the follow-up messages. The next run's deferrals count from 0."""
        self.history.deferrals = 0
        again = self.delivery.next_message(**{POLICIES: self.history.option()})
        self.delivery.add_follow_up(OutgoingMessage(again, delay_ms or None))

    def record_last_failure(self) -> None:
        """Write the failure into the message's options, if the message is not retried."""
        self.history.failed(self.error, now_ms(), None)
        self.message.options[POLICIES] = self.history.option()
        self.show_traceback()

    def show_traceback(self) -> None:
        """Store the traceback in the option of Dramatiq's Retries, for dashboards and other middleware."""
        text = traceback_of(self.error)
        if text is not None:
            self.message.options["traceback"] = text

    def decision(
        self,
        outcome: Outcome,
        reason: str | None = None,
        *,
        rule: str | None = None,
        delay_ms: int | None = None,
        dead_letter: bool = False,
    ) -> Decision:
        return Decision(
            outcome,
            reason,
            exception=self.error,
            rule=rule,
            attempt=self.history.attempt,
            delay_ms=delay_ms,
            dead_letter=dead_letter,
        )


def decide(defaults: BrokerDefaults, run: FailedRun) -> Decision:
    """Decide about the message of a failed run, and add the follow-up messages to the delivery."""
    rule, cause = deciding_rule(run.policy.rules, run.error)
    if is_a(cause, Shutdown):
        return _interrupted(defaults, run)
    if is_a(cause, Snooze):
        return _snoozed(defaults, run, cause)
    if is_a(cause, Verdict):
        run.record_last_failure()
        return _discarded(defaults, run, None)
    if is_a(cause, Retry):
        cause = _with_checked_delay(run.message, cause)
    if rule is None:
        return _unclassified(defaults, run, cause)
    if rule.policy is not None:
        return _retry(defaults, run, cause, rule.policy, rule.id)
    run.record_last_failure()
    if rule.verb is Verb.DISCARD:
        return _discarded(defaults, run, rule.id)
    return run.decision(Outcome.ALERTED, rule=rule.id, dead_letter=True)


def _unclassified(defaults: BrokerDefaults, run: FailedRun, cause: BaseException) -> Decision:
    """Decide without a rule: by the policy for unclassified errors, otherwise by Dramatiq's options."""
    if _dramatiq.is_missing_middleware(run.error):
        run.record_last_failure()
        return run.decision(Outcome.DEAD, _UNCLASSIFIED, dead_letter=True)
    if defaults.unclassified is None or is_a(cause, (RateLimitExceeded, Retry)) or _is_thrown(run):
        return _by_stock_options(defaults, run, cause)
    return _retry(defaults, run, cause, defaults.unclassified, _UNCLASSIFIED)


def _requested_delay(message: MessageProxy, request: Retry | Snooze) -> int | None:
    """Return the delay of a job's ``Retry`` or `Snooze` in milliseconds; log a warning and return None for other values."""
    snoozed = is_a(request, Snooze)
    kind = "Snooze" if snoozed else "Retry"
    what = f"The delay of the {kind} in message {message.message_id}"
    try:
        delay = request.delay
        # A Snooze keeps its delay in milliseconds, a Retry as given.
        if not snoozed or isinstance(delay, LikelySeconds):
            warn_of_seconds_once(f"actor {message.actor_name!r}: {kind}", "delay", delay)
        return clamped_wait(delay, "%s", what)
    except BaseException as error:  # The delay may be a property of the user's class.
        logger.warning("%s is ignored: %s", what, text_of(error))
        return None


def _with_checked_delay(message: MessageProxy, request: Retry) -> Retry:
    """Return the job's ``Retry`` with a delay that Dramatiq accepts; a new ``Retry`` if the delay can't be set."""
    if quietly(lambda: request.delay is None):
        return request
    delay = _requested_delay(message, request)
    quietly(lambda: setattr(request, "delay", delay))
    if quietly(lambda: request.delay == delay):
        return request
    return Retry(text_of(request), delay=delay)


def _is_thrown(run: FailedRun) -> bool:
    throws: Any = run.policy.options.get("throws")
    return bool(throws) and is_a(run.error, throws)


def _interrupted(defaults: BrokerDefaults, run: FailedRun) -> Decision:
    declared = run.policy.options.get("max_retries", defaults.stock.max_retries)
    if run.message.options.get("max_retries", declared) == 0:
        return run.decision(Outcome.DEAD, _UNCLASSIFIED, dead_letter=True)
    run.add_next_run()
    return run.decision(Outcome.INTERRUPTED)


def _snoozed(defaults: BrokerDefaults, run: FailedRun, snooze: Snooze) -> Decision:
    """Defer the message, until `max_snooze` is used up. ``snooze`` is the error or a leaf of the error's group."""
    history, now = run.history, now_ms()
    if history.snoozed_since is None:
        history.snoozed_since = now
    left = history.snoozed_since + defaults.max_snooze - now
    if left <= 0:
        return run.decision(Outcome.DEAD, "exhausted", dead_letter=True)
    history.snoozes += 1
    requested = _requested_delay(run.message, snooze)
    delay = min(_UNREADABLE_SNOOZE if requested is None else requested, left)
    run.add_next_run(delay)
    return run.decision(Outcome.DEFERRED, "snoozed", delay_ms=delay)


def _discarded(defaults: BrokerDefaults, run: FailedRun, rule_id: str | None, reason: str | None = None) -> Decision:
    keep = run.policy.dead_letter_discards
    if keep is None:
        keep = defaults.dead_letter_discards
    return run.decision(Outcome.DISCARDED, reason, rule=rule_id, dead_letter=keep)


def _retry(
    defaults: BrokerDefaults, run: FailedRun, cause: BaseException, policy: RetryPolicy, rule_id: str
) -> Decision:
    history, message, now = run.history, run.message, now_ms()
    number, first = history.count(rule_id, now)
    highest = max(defaults.max_attempts, policy.attempts, run.policy.max_attempts)
    exhausted = number >= policy.attempts or history.ended >= highest
    delay = 0
    if not exhausted:
        requested = cause.delay if is_a(cause, Retry) else None
        delay = safe_wait(policy.wait, number, cause) if requested is None else requested  # type: ignore[arg-type]
        exhausted = policy.max_elapsed is not None and now + delay - first > policy.max_elapsed  # type: ignore[operator]
    history.failed(run.error, now, None if exhausted else delay)
    run.show_traceback()
    if not exhausted:
        history.retry_by_rule(message.options)
        message.options["requeue_timestamp"] = now
        run.add_next_run(delay)
        return run.decision(Outcome.RETRIED, rule=rule_id, delay_ms=delay)
    message.options[POLICIES] = history.option()
    add_exhausted_callback(run.broker, run.delivery, message, history.attempt - 1, history.attempt - 1)
    if policy.then == "discard":
        return _discarded(defaults, run, rule_id, "exhausted")
    outcome = Outcome.ALERTED if policy.then == "alert" else Outcome.DEAD
    return run.decision(outcome, "exhausted", rule=rule_id, dead_letter=True)


def _by_stock_options(defaults: BrokerDefaults, run: FailedRun, cause: BaseException) -> Decision:
    """Let Dramatiq's Retries decide, and add its message to the follow-up messages."""
    recorder = _StockRetriesRecorder(run.broker)
    history, message = run.history, run.message
    options = message.options
    # Dramatiq compares max_retries only with its own retries.
    by_rules = min(history.retried, retries_of(options))
    retries = options["retries"] = retries_of(options) - by_rules
    # Dramatiq ignores exception groups: pass the deciding leaf.
    error_for_retries = cause if is_a(cause, (RateLimitExceeded, Retry)) else run.error
    try:
        Retries.after_process_message(defaults.stock, recorder, message, exception=error_for_retries)
    finally:
        options["retries"] += by_rules
    if "traceback" in options:
        options["traceback"] = encodable(options["traceback"])
    if recorder.details is not None:
        add_exhausted_callback(run.broker, run.delivery, message, **recorder.details)
    now = now_ms()
    if not message.failed:
        send = recorder.sends[0]
        delay = max(0, int(send.delay or 0))
        history.failed(run.error, now, delay)
        run.add_next_run(delay)
        return run.decision(Outcome.RETRIED, delay_ms=delay)
    history.failed(run.error, now, None)
    options[POLICIES] = history.option()
    reason = "thrown" if _is_thrown(run) else "exhausted" if retries else _UNCLASSIFIED
    return run.decision(Outcome.DEAD, reason, dead_letter=True)


class _StockRetriesRecorder(Recorder):
    """Records the message from Dramatiq's ``Retries``, and the arguments for ``on_retry_exhausted``.

    ``Retries`` asks for the message's own actor first, and a second time only for the actor of ``on_retry_exhausted``.
    """

    details: dict[str, Any] | None = None
    own_actor_requested = False

    def get_actor(self, name: str) -> Any:
        if self.own_actor_requested:
            return self
        self.own_actor_requested = True
        return self.broker.get_actor(name)

    def send(self, message: dict[str, Any], details: dict[str, Any]) -> None:
        self.details = details
