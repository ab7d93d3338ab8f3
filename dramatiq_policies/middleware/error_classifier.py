"""The middleware that decides what becomes of a message: its settings, its hooks, and what it logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import Retries

from ..common import clock
from ..common.durations import WEEK_MS
from ..common.safe_logger import SafeLogger
from ..delivery.actor_policy import ACTOR_OPTIONS, checked_stock_options, expect_callable
from ..delivery.broker_state import state_of
from ..delivery.consumer import quiet
from ..delivery.decision import SUCCEEDED, Decision
from ..delivery.decisions import decide
from ..delivery.delivery import PREPARED, READY_AT, Delivery, current
from ..delivery.history import now_ms
from ..delivery.validation import MAX_BODY_BYTES, timedeltas_to_ms
from ..errors import ConfigurationError, HandoffFailed, checked_duration
from ..interrupts import unwrap_interrupt
from ..observability.worker_log import make_stock_loggers_safe, report_unheard, stock_lines_logger
from ..outcomes import Outcome, OutcomeEvent, Subscriber, class_path, extra_of, text_of
from ..rules.matching import RuleSet
from ..rules.parsing import parse_rules
from ..rules.rule import RetryPolicy
from .base import PolicyMiddleware, order_middleware

if TYPE_CHECKING:
    from dramatiq import Message
    from dramatiq.broker import Broker, MessageProxy
    from typing_extensions import Self

    from ..delivery.broker_state import BrokerState

__all__ = ["ErrorClassifier"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")
#: Of how many pairs of actor and exception it is remembered that they have alerted.
_REMEMBERED = 1_000
_DEFAULTS = {"max_retries": 20, "min_backoff": None, "max_backoff": None, "retry_when": None}


class ErrorClassifier(PolicyMiddleware, Retries):
    """Retries, discards and alerts by rules that name exceptions; takes the place of Dramatiq's ``Retries``.

    Parameters:
      retry_on, discard_on, alert_on: Rules for every actor of the broker, in the forms that an actor takes, also as
        dotted strings (resolved at first use). An actor with ``broker_rules=False`` has only its own.
      unclassified: A `RetryPolicy` for errors that no rule names. None, the default, leaves them to the stock options.
      max_attempts: How many runs our rules may end in all, whatever alternates. The actor's highest attempts count if
        they are more. Default 25.
      alert_interval: How long an alert of the same actor and exception fires only once, in milliseconds or as a
        ``timedelta``; 0 for always. Default 5 minutes.
      max_snooze: How long a job may snooze in all, from the first time on. Default 7 days.
      dead_letter_discards: Whether discarded messages are kept on the dead-letter queue. Default False.
      after_discard: ``callable(message, exception)``, called once when a message has ended badly for good.
      max_body_bytes: The largest message body that a worker decodes, in bytes. A larger one becomes a dead letter as it is,
        reason ``malformed``. None for any size. Default 16 MB.
      on_outcome: Called with each `OutcomeEvent`, or several such callables. What they raise is logged.
      max_retries, min_backoff, max_backoff, retry_when: As in Dramatiq's ``Retries``. Left out, those of a ``Retries``
        that was on the broker are kept.

    Raises:
      ConfigurationError: An argument makes no sense.
    """

    def __init__(
        self,
        *,
        retry_on: Any = None,
        discard_on: Any = None,
        alert_on: Any = None,
        unclassified: RetryPolicy | None = None,
        max_attempts: int = 25,
        alert_interval: int | timedelta = 300_000,
        max_snooze: int | timedelta = WEEK_MS,
        dead_letter_discards: bool = False,
        max_body_bytes: int | None = MAX_BODY_BYTES,
        after_discard: Callable[[Any, BaseException], object] | None = None,
        on_outcome: Subscriber | tuple[Subscriber, ...] | list[Subscriber] | None = None,
        **stock: Any,
    ) -> None:
        where = "ErrorClassifier"
        unknown = stock.keys() - _DEFAULTS.keys()
        if unknown:
            raise TypeError(f"{where}() got an unexpected keyword argument {min(unknown)!r}")
        if stock.get("retry_when") is not None:
            expect_callable(where, "retry_when", stock["retry_when"], "retries, exception")
        stock = {**stock, **checked_stock_options(where, {k: v for k, v in stock.items() if v is not None})}
        Retries.__init__(self, **{**_DEFAULTS, **stock})
        self._given = stock
        self.logger = stock_lines_logger()
        self.rules = parse_rules(where, "broker", retry_on=retry_on, discard_on=discard_on, alert_on=alert_on)
        if unclassified is not None and not isinstance(unclassified, RetryPolicy):
            raise ConfigurationError.of_option(where, "unclassified", "a RetryPolicy or None", unclassified)
        self.unclassified = unclassified
        if type(max_attempts) is not int or max_attempts < 1:
            raise ConfigurationError.of_option(where, "max_attempts", "an int of at least 1", max_attempts)
        self.max_attempts = max_attempts
        self.alert_interval = checked_duration(where, "alert_interval", alert_interval)
        self.max_snooze = checked_duration(where, "max_snooze", max_snooze)
        if not isinstance(dead_letter_discards, bool):
            raise ConfigurationError.of_option(where, "dead_letter_discards", "True or False", dead_letter_discards)
        self.dead_letter_discards = dead_letter_discards
        if max_body_bytes is not None and (type(max_body_bytes) is not int or max_body_bytes < 1):
            expected = "bytes, an int of at least 1, or None"
            raise ConfigurationError.of_option(where, "max_body_bytes", expected, max_body_bytes)
        self.max_body_bytes = max_body_bytes
        if after_discard is not None:
            expect_callable(where, "after_discard", after_discard, "message, exception")
        self.after_discard = after_discard
        subscribers = (
            () if on_outcome is None else on_outcome if isinstance(on_outcome, (tuple, list)) else (on_outcome,)
        )
        for subscriber in subscribers:
            expect_callable(where, "on_outcome", subscriber, "event")
        self.subscribers = tuple(subscribers)
        self._alerted: dict[tuple[str | None, type[BaseException]], float] = {}

    replaces = (Retries, "retry each message")

    @property
    def actor_options(self) -> set[str]:
        return {*super().actor_options, *ACTOR_OPTIONS}

    def inherit_settings(self, stock: Retries) -> None:
        """Keep the settings of the Retries that was on the broker, where none were given."""
        for name in _DEFAULTS.keys() - self._given.keys():
            setattr(self, name, getattr(stock, name))

    def attach(self, state: BrokerState) -> None:
        make_stock_loggers_safe(state.broker)
        state.max_body_bytes = self.max_body_bytes
        state.observe(self, self._report, self, successes=False)
        for subscriber in self.subscribers:
            state.subscribe(self, subscriber)
        if self.after_discard is not None:
            state.after_discard = (self.after_discard,)

    def for_stub(self) -> Self:
        twin = super().for_stub()
        vars(twin)["_alerted"] = {}
        return twin

    # Hooks. The one before and the one after a run are on every message's way: they do no more than they must.

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        state = self.attached_to
        if state is None:
            state = order_middleware(broker)
        if getattr(state.moving_delayed, "on", False):
            # Out of the delay queue: it became ready when its time came, not now.
            return
        options = message.options
        options[READY_AT] = now_ms() if delay is None else _ready_at(message, delay)
        timedeltas_to_ms(options)

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is not None:
            delivery.policy = delivery.consumer.state.policies.get(message.actor_name)
            delivery.stage = PREPARED
            delivery.proxy = message
            current.set(delivery)

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        current.set(None)
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            Retries.after_process_message(self, broker, message, result=result, exception=exception)
            return
        delivery.proxy = None
        if exception is None:
            # Or not, if another middleware has failed it: then the worker nacks it, which says so.
            delivery.decision = SUCCEEDED
        else:
            try:
                # Not what is on the delivery: a before-hook of another's may have raised ahead of ours.
                declared = delivery.consumer.state.policies[message.actor_name]
                delivery.decision = decide(self, broker, delivery, declared, message, unwrap_interrupt(exception))
            except BaseException as error:  # Not even an exit: it would end the worker's thread.
                logger.critical("No decision could be made on message %s.", message.message_id, exc_info=True)
                stand_in = HandoffFailed(f"no decision could be made: {type(error).__name__}: {text_of(error)}")
                delivery.decision = Decision(Outcome.DEAD, "handoff_failed", exception=stand_in, dead_letter=True)
            if delivery.decision.dead_letter:
                message.fail()

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        current.set(None)
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is None:
            return
        delivery.proxy = None
        decision = delivery.decision
        if decision is None:
            delivery.decision = Decision(Outcome.SKIPPED)
        elif decision.exception is not None:
            # Skipped by the wrapper of the actor's function.
            message.stuff_exception(decision.exception)
            if decision.dead_letter:
                message.fail()

    def before_worker_boot(self, broker: Broker, worker: Any) -> None:
        super().before_worker_boot(broker, worker)
        RuleSet((), self.rules).resolve()
        make_stock_loggers_safe(broker)
        report_unheard(state_of(broker))
        state_of(broker).stopping.clear()

    def before_worker_shutdown(self, broker: Broker, worker: Any) -> None:
        state_of(broker).stopping.set()
        quiet(worker)

    def after_worker_shutdown(self, broker: Broker, worker: Any) -> None:
        state = state_of(broker)
        later, state.requeue_after_shutdown = state.requeue_after_shutdown, []
        for put_back in later:
            put_back()
        if state.fatal is not None and state.in_command:
            # What dramatiq exits with when its broker can't be reached.
            raise SystemExit(3)

    # Records.

    def _report(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        """The one line of a retried or put back message, and of an alert."""
        error = event.exception
        if event.outcome is Outcome.RETRIED:
            assert error is not None  # It was the job's.
            logger.warning(
                "retried: message %s of actor %s, attempt %s, again in %s ms: %s: %s",
                event.message_id,
                event.actor,
                event.attempt,
                event.delay_ms,
                type(error).__name__,
                text_of(error),
                extra=extra_of(event, message),
            )
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug(
                    "The stack of message %s:", event.message_id, exc_info=error, extra=extra_of(event, message)
                )
        elif event.outcome is Outcome.ALERTED:
            assert error is not None  # As above.
            self._alert(event, error, message)
        elif event.outcome in (Outcome.INTERRUPTED, Outcome.DEFERRED, Outcome.DUPLICATE, Outcome.SKIPPED):
            logger.log(
                logging.WARNING if event.reason == "handoff_failed" else logging.INFO,
                "%s: message %s of actor %s%s",
                event.outcome.value,
                event.message_id,
                event.actor,
                "" if event.reason is None else f" ({event.reason})",
                extra=extra_of(event, message),
            )

    def _alert(self, event: OutcomeEvent, error: BaseException, message: MessageProxy | None) -> None:
        key = (event.actor, type(error))
        now = clock.monotonic()
        last = self._alerted.get(key)
        repeated = last is not None and (now - last) * 1_000 < self.alert_interval
        if not repeated:
            if len(self._alerted) >= _REMEMBERED:
                # Somebody makes classes as he goes; they must not pile up here.
                self._alerted.clear()
            self._alerted[key] = now
        (logger if repeated else alerts).log(
            logging.WARNING if repeated else logging.CRITICAL,
            "alerted%s: message %s of actor %s, attempt %s: %s: %s",
            " again" if repeated else "",
            event.message_id,
            event.actor,
            event.attempt,
            class_path(type(error)),
            text_of(error),
            extra=extra_of(event, message),
            exc_info=None if repeated else error,
        )


def _ready_at(message: Message[Any], delay: Any) -> int:
    """When a message that is sent with a delay is ready, in ms since the epoch.

    Raises:
      ConfigurationError: The delay is no number, or not finite. Dramatiq would send the message, and run it at once.
    """
    try:
        if isinstance(delay, bool):
            raise TypeError
        return now_ms() + int(delay)
    except (TypeError, ValueError, OverflowError):
        raise ConfigurationError.of_option(
            f"A message for actor {message.actor_name!r}", "delay", "milliseconds or a timedelta", delay
        ) from None
