"""The middleware that decides about each message: settings, hooks, log lines."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import Retries

from ..common.clock import now_ms
from ..common.durations import WEEK_MS
from ..common.safe_logger import SafeLogger
from ..delivery.actor_options import BrokerExceptions, BrokerRetryOn
from ..delivery.actor_policy import checked_stock_options, expect_callable
from ..delivery.broker_state import DeliverySettings, state_of
from ..delivery.consumer import quiet
from ..delivery.decision import SUCCEEDED, Decision
from ..delivery.delivery import PREPARED, READY_AT, Delivery, current
from ..delivery.failed_run import BrokerDefaults, FailedRun, decide
from ..delivery.validation import MAX_BODY_BYTES, timedeltas_to_ms
from ..errors import ConfigurationError, HandoffFailed, checked_duration
from ..interrupts import unwrap_interrupt
from ..observability.outcome_log import OutcomeLog
from ..observability.worker_log import make_stock_loggers_safe, report_unheard, stock_lines_logger
from ..outcomes import Outcome, Subscriber, text_of
from ..rules.matching import RuleSet
from ..rules.parsing import parse_rules
from ..rules.rule import RetryPolicy
from .base import PolicyMiddleware, order_middleware

if TYPE_CHECKING:
    from dramatiq import Message, Worker
    from dramatiq.broker import Broker, MessageProxy

    from ..delivery.broker_state import BrokerState

__all__ = ["ErrorClassifier"]

logger = SafeLogger("dramatiq_policies.outcomes")
alerts = SafeLogger("dramatiq_policies.alerts")
_DEFAULTS = {"max_retries": 20, "min_backoff": None, "max_backoff": None, "retry_when": None}


class ErrorClassifier(PolicyMiddleware, Retries):
    """Retry, discard or alert by rules that name exceptions. It takes the place of Dramatiq's ``Retries``.

    `install` adds one. Pass your own for rules and settings that hold for all actors::

        from datetime import timedelta

        from dramatiq_policies import ErrorClassifier, RetryPolicy, exponential, install

        install(
            broker,
            error_classifier=ErrorClassifier(
                retry_on={ConnectionError: RetryPolicy(attempts=8, wait=exponential(initial=timedelta(seconds=2)))},
                discard_on="stripe.CardError",
                alert_on="myshop.errors.MissingApiKey",
                unclassified=RetryPolicy(attempts=5),
            ),
        )

    An actor adds rules of its own by the options ``retry_on``, ``discard_on`` and ``alert_on``. For each exception the rule for
    the nearest class in its MRO decides; for the same class an actor's rule goes before a broker's.

    Parameters:
      retry_on, discard_on, alert_on: Rules for every actor of the broker, in the same forms as an actor's options. Here a class
        may also be a dotted string, imported at first use. An actor with ``broker_rules=False`` ignores these rules.
      unclassified: A `RetryPolicy` for errors that no rule names. Default None: Dramatiq's options decide (20 retries over
        several weeks).
      max_attempts: The most runs of one message that rules may end, counted over all rules. An actor with a rule of more
        attempts may use all of them. Default 25.
      alert_interval: How often an alert of the same actor and exception fires, and how often the stack of a dead message of
        the same actor and exception is logged: once per interval. Milliseconds or a ``timedelta``; 0 for always. Default 5
        minutes.
      max_snooze: How long a job may snooze, from its first `Snooze` on. Milliseconds or a ``timedelta``. Default 7 days.
      dead_letter_discards: Whether to keep discarded messages on the dead-letter queue. Default False.
      after_discard: ``callable(message, exception)``, called once when a message has failed permanently: discarded, alerted,
        dead or expired.
      max_body_bytes: The largest message body that a worker decodes, in bytes. A larger message goes undecoded to the dead
        letters, reason ``malformed``. None for any size. Default 16 MB.
      on_outcome: A callable, or several, called with the `OutcomeEvent` of each delivery. Their errors are logged and change
        nothing.
      max_retries, min_backoff, max_backoff, retry_when: As in Dramatiq's ``Retries``. Default: the settings of the broker's
        ``Retries``.

    Raises:
      ConfigurationError: An argument is wrong.
    """

    def __init__(
        self,
        *,
        retry_on: BrokerRetryOn | None = None,
        discard_on: BrokerExceptions | None = None,
        alert_on: BrokerExceptions | None = None,
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
        self._defaults: BrokerDefaults | None = None

    replaces = (Retries, "retry each message")

    def inherit_settings(self, stock: Retries) -> None:
        """Take over the settings of the broker's Retries that were not passed to this middleware."""
        for name in _DEFAULTS.keys() - self._given.keys():
            setattr(self, name, getattr(stock, name))

    def attach(self, state: BrokerState) -> None:
        make_stock_loggers_safe(state.broker)
        self._defaults = BrokerDefaults(
            stock=self,
            unclassified=self.unclassified,
            max_attempts=self.max_attempts,
            max_snooze=self.max_snooze,
            dead_letter_discards=self.dead_letter_discards,
        )
        state.settings = DeliverySettings(self.max_body_bytes, self.alert_interval, self.after_discard)
        state.outcomes.observe(self, OutcomeLog(self.alert_interval).record, self, successes=False)
        for subscriber in self.subscribers:
            state.outcomes.subscribe(self, subscriber)

    # Hooks. before_process_message and after_process_message run for every message: keep them short.

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        state = self.attached_to
        if state is None:
            state = order_middleware(broker)
        if getattr(state.moving_delayed, "on", False):
            # A message from the delay queue became ready at its due time, not now.
            return
        message.options[READY_AT] = now_ms() if delay is None else _ready_at(message, delay)
        timedeltas_to_ms(message)

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        delivery: Delivery | None = getattr(message, "delivery", None)
        if delivery is not None:
            delivery.policy = delivery.transport.state.policies.get(message.actor_name)
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
            # If another middleware has failed the message, the worker nacks it, and the consumer decides anew.
            delivery.decision = SUCCEEDED
        else:
            try:
                # Not `delivery.policy`: another middleware's before-hook may have raised ahead of ours.
                policy = delivery.transport.state.policies[message.actor_name]
                assert self._defaults is not None  # Set by `attach`.
                run = FailedRun(broker, delivery, policy, message, unwrap_interrupt(exception))
                delivery.decision = decide(self._defaults, run)
            except BaseException as error:  # SystemExit would end the worker's thread.
                logger.critical(
                    "Deciding on message %s of actor %s raised an error. The message becomes a dead letter.",
                    message.message_id,
                    message.actor_name,
                    exc_info=True,
                )
                stand_in = HandoffFailed(f"the decision raised an error: {type(error).__name__}: {text_of(error)}")
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
            # `Delivery.skip` has failed the message, if it becomes a dead letter.
            message.stuff_exception(decision.exception)

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        super().before_worker_boot(broker, worker)
        RuleSet((), self.rules).resolve()
        make_stock_loggers_safe(broker)
        report_unheard(state_of(broker))
        state_of(broker).stopping.clear()

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        state_of(broker).stopping.set()
        quiet(worker)

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        state = state_of(broker)
        requeues, state.requeue_after_shutdown = state.requeue_after_shutdown, []
        for requeue in requeues:
            requeue()
        if state.fatal is not None and state.in_command:
            # Dramatiq's exit code for an unreachable broker.
            raise SystemExit(3)


def _ready_at(message: Message[Any], delay: Any) -> int:
    """Return when a message sent with a delay is ready, in ms since the epoch.

    Raises:
      ConfigurationError: The delay is no finite number. Dramatiq would send the message and run it at once.
    """
    try:
        if isinstance(delay, bool):
            raise TypeError
        return now_ms() + int(delay)
    except (TypeError, ValueError, OverflowError):
        raise ConfigurationError.of_option(
            f"A message for actor {message.actor_name!r}", "delay", "milliseconds or a timedelta", delay
        ) from None
