"""The decision on a job that failed: retry, discard, alert, or the dead letters.

Called by `ErrorClassifier`, whose settings it reads. `settlement` does what is decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import Retries, Shutdown

from .._job_errors import is_a, quietly
from ..common.durations import clamped_wait
from ..common.texts import encodable
from ..errors import Snooze, Verdict
from ..outcomes import Outcome, logger, text_of
from ..rules.backoff import safe_wait
from ..rules.rule import RetryPolicy, Verb
from ..rules.verdicts import deciding
from .callbacks import tell_exhausted
from .decision import Decision
from .delivery import Delivery, OutgoingMessage, Recorder
from .history import POLICIES, History, now_ms, retries_of, traceback_of

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker, MessageProxy

    from ..middleware.error_classifier import ErrorClassifier
    from .actor_policy import ActorPolicy

__all__ = ["decide"]

_UNCLASSIFIED = "unclassified"
#: The wait of a `Snooze` whose own can't be read, in milliseconds.
_UNREADABLE_SNOOZE = 15_000


def decide(
    classifier: ErrorClassifier,
    broker: Broker,
    delivery: Delivery,
    declared: ActorPolicy,
    message: MessageProxy,
    error: BaseException,
) -> Decision:
    """Decide what becomes of a message whose job has failed, and put what is to be sent on its delivery."""
    history = History(message.options)
    rule, cause = deciding(declared.rules, error)
    if is_a(cause, Shutdown):
        return _interrupted(classifier, delivery, declared, message, history, error)
    if is_a(cause, Verdict):
        return _apply_verdict(classifier, delivery, declared, message, history, error, cause)
    if is_a(cause, Retry):
        cause = _with_checked_delay(message, cause)
    policy, rule_id = (None, None) if rule is None else (rule.policy, rule.id)
    if rule is None and classifier.unclassified is not None and not _is_stock(declared, error, cause):
        policy, rule_id = classifier.unclassified, _UNCLASSIFIED
    if policy is not None and rule_id is not None:
        return _retry(classifier, broker, delivery, declared, message, history, error, cause, policy, rule_id)
    if rule is None:
        return _by_stock_options(classifier, broker, delivery, declared, message, history, error, cause)
    history.failed(error, now_ms(), None)
    message.options[POLICIES] = history.option()
    _show_traceback(message, error)
    if rule.verb is Verb.DISCARD:
        return _discarded(classifier, declared, history, error, rule.id)
    return Decision(Outcome.ALERTED, exception=error, rule=rule.id, attempt=history.attempt, dead_letter=True)


def _is_stock(declared: ActorPolicy, error: BaseException, cause: BaseException) -> bool:
    """Whether it is left to the stock options, whatever ``unclassified`` says."""
    return is_a(cause, (RateLimitExceeded, Retry)) or _is_thrown(declared, error)


def _asked_delay(message: MessageProxy, asking: Any) -> int | None:
    """The delay of a job's ``Retry`` or `Snooze` in milliseconds; None, with a warning, if it is no duration."""
    what = f"The delay of the {'Snooze' if is_a(asking, Snooze) else 'Retry'} in message {message.message_id}"
    try:
        return clamped_wait(asking.delay, what)
    except BaseException as error:  # The delay may be a property of the user's.
        logger.warning("%s is ignored: %s", what, text_of(error))
        return None


def _with_checked_delay(message: MessageProxy, asking: Retry) -> Retry:
    """The job's ``Retry``, with a delay that Dramatiq's own code takes; another in its place if it can't be given one."""
    if quietly(lambda: asking.delay is None):
        return asking
    delay = _asked_delay(message, asking)
    quietly(lambda: setattr(asking, "delay", delay))
    if quietly(lambda: asking.delay == delay):
        return asking
    return Retry(text_of(asking), delay=delay)


def _is_thrown(declared: ActorPolicy, error: BaseException) -> bool:
    throws: Any = declared.options.get("throws")
    return bool(throws) and is_a(error, throws)


def _interrupted(
    classifier: ErrorClassifier,
    delivery: Delivery,
    declared: ActorPolicy,
    message: MessageProxy,
    history: History,
    error: BaseException,
) -> Decision:
    if message.options.get("max_retries", declared.options.get("max_retries", classifier.max_retries)) == 0:
        return Decision(Outcome.DEAD, _UNCLASSIFIED, exception=error, attempt=history.attempt, dead_letter=True)
    delivery.add_to_outbox(OutgoingMessage(_again(delivery, history)))
    return Decision(Outcome.INTERRUPTED, exception=error, attempt=history.attempt)


def _apply_verdict(
    classifier: ErrorClassifier,
    delivery: Delivery,
    declared: ActorPolicy,
    message: MessageProxy,
    history: History,
    error: BaseException,
    verdict: Verdict,
) -> Decision:
    """Do what a job itself said by raising ``verdict``, which is ``error`` or one of the leaves of that group."""
    now = now_ms()
    if not is_a(verdict, Snooze):
        history.failed(error, now, None)
        message.options[POLICIES] = history.option()
        _show_traceback(message, error)
        return _discarded(classifier, declared, history, error, None)
    if history.snoozed_since is None:
        history.snoozed_since = now
    left = history.snoozed_since + classifier.max_snooze - now
    if left <= 0:
        return Decision(Outcome.DEAD, "exhausted", exception=error, attempt=history.attempt, dead_letter=True)
    history.snoozes += 1
    asked = _asked_delay(message, verdict)
    delay = min(_UNREADABLE_SNOOZE if asked is None else asked, left)
    delivery.add_to_outbox(OutgoingMessage(_again(delivery, history), delay or None))
    return Decision(Outcome.DEFERRED, "snoozed", exception=error, attempt=history.attempt, delay_ms=delay)


def _discarded(
    classifier: ErrorClassifier,
    declared: ActorPolicy,
    history: History,
    error: BaseException,
    rule_id: str | None,
    reason: str | None = None,
) -> Decision:
    keep = declared.dead_letter_discards
    if keep is None:
        keep = classifier.dead_letter_discards
    return Decision(
        Outcome.DISCARDED,
        reason,
        exception=error,
        rule=rule_id,
        attempt=history.attempt,
        dead_letter=keep,
    )


def _retry(
    classifier: ErrorClassifier,
    broker: Broker,
    delivery: Delivery,
    declared: ActorPolicy,
    message: MessageProxy,
    history: History,
    error: BaseException,
    cause: BaseException,
    policy: RetryPolicy,
    rule_id: str,
) -> Decision:
    now = now_ms()
    number, first = history.count(rule_id, now)
    highest = max(classifier.max_attempts, policy.attempts, declared.max_attempts)
    exhausted = number >= policy.attempts or history.ended >= highest
    delay = 0
    if not exhausted:
        asked = cause.delay if is_a(cause, Retry) else None
        delay = safe_wait(policy.wait, number, cause) if asked is None else asked  # type: ignore[arg-type]
        exhausted = policy.max_elapsed is not None and now + delay - first > policy.max_elapsed  # type: ignore[operator]
    history.failed(error, now, None if exhausted else delay)
    _show_traceback(message, error)
    if not exhausted:
        history.retry_by_rule(message.options)
        message.options["requeue_timestamp"] = now
        delivery.add_to_outbox(OutgoingMessage(_again(delivery, history), delay or None))
        return Decision(Outcome.RETRIED, exception=error, rule=rule_id, attempt=history.attempt, delay_ms=delay)
    message.options[POLICIES] = history.option()
    tell_exhausted(broker, delivery, message, history.attempt - 1, history.attempt - 1)
    if policy.then == "discard":
        return _discarded(classifier, declared, history, error, rule_id, "exhausted")
    return Decision(
        Outcome.ALERTED if policy.then == "alert" else Outcome.DEAD,
        "exhausted",
        exception=error,
        rule=rule_id,
        attempt=history.attempt,
        dead_letter=True,
    )


def _by_stock_options(
    classifier: ErrorClassifier,
    broker: Broker,
    delivery: Delivery,
    declared: ActorPolicy,
    message: MessageProxy,
    history: History,
    error: BaseException,
    cause: BaseException,
) -> Decision:
    """Leave it to Dramatiq's own code, and hand on what it would have enqueued."""
    recorder = _StockRetriesRecorder(broker)
    options = message.options
    # What Dramatiq counts and compares with max_retries are its own retries.
    by_rules = min(history.retried, retries_of(options))
    retries = options["retries"] = retries_of(options) - by_rules
    try:
        Retries.after_process_message(classifier, recorder, message, exception=_as_stock(error, cause))
    finally:
        options["retries"] += by_rules
    if "traceback" in options:
        options["traceback"] = encodable(options["traceback"])
    if recorder.told is not None:
        tell_exhausted(broker, delivery, message, **recorder.told)
    now = now_ms()
    if not message.failed:
        send = recorder.sends[0]
        delay = max(0, int(send.delay or 0))
        history.failed(error, now, delay)
        delivery.add_to_outbox(OutgoingMessage(_again(delivery, history), delay or None))
        return Decision(Outcome.RETRIED, exception=error, attempt=history.attempt, delay_ms=delay)
    history.failed(error, now, None)
    message.options[POLICIES] = history.option()
    reason = "thrown" if _is_thrown(declared, error) else "exhausted" if retries else _UNCLASSIFIED
    return Decision(Outcome.DEAD, reason, exception=error, attempt=history.attempt, dead_letter=True)


class _StockRetriesRecorder(Recorder):
    """Records what Dramatiq's ``Retries`` enqueues, and what ``on_retry_exhausted`` is told.

    ``Retries`` asks for the message's own actor first, and a second time only for the actor of ``on_retry_exhausted``.
    """

    told: dict[str, Any] | None = None
    asked = False

    def get_actor(self, name: str) -> Any:
        if self.asked:
            return self
        self.asked = True
        return self.broker.get_actor(name)

    def send(self, message: dict[str, Any], told: dict[str, Any]) -> None:
        self.told = told


def _show_traceback(message: MessageProxy, error: BaseException) -> None:
    """Put the traceback where Dramatiq's own retries put it, for dashboards and other middleware."""
    text = traceback_of(error)
    if text is not None:
        message.options["traceback"] = text


def _as_stock(error: BaseException, cause: BaseException) -> BaseException:
    """The error that Dramatiq's own code is shown: it knows nothing of exception groups."""
    return cause if is_a(cause, (RateLimitExceeded, Retry)) else error


def _again(delivery: Delivery, history: History) -> Message[Any]:
    """The message for its next run, with what it carries of its past."""
    history.deferrals = 0
    return delivery.again(**{POLICIES: history.option()})
