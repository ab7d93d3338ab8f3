"""A wrong declaration is refused with the actor, the option, the expected and the actual value."""

from __future__ import annotations

import math
import re
from datetime import date, timedelta

import dramatiq
import pytest

from dramatiq_policies import (
    ConfigurationError,
    ErrorClassifier,
    when,
)
from dramatiq_policies.delivery.actor_options import ACTOR_OPTIONS
from dramatiq_policies.testing import drain

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    PaymentError,
    failing,
)


async def later(*args):
    return True


def made_one_by_one(*args):
    yield True


@pytest.mark.parametrize(
    ("option", "value", "got"),
    [
        ("retry_on", "PaymentError", "'PaymentError'"),
        ("retry_on", PaymentError(), "PaymentError()"),
        ("retry_on", {PaymentError: 0}, "0"),
        ("retry_on", {PaymentError: "5"}, "'5'"),
        ("retry_on", int, "<class 'int'>"),
        ("discard_on", {PaymentError: 5}, f"{{{PaymentError!r}: 5}}"),
        ("discard_on", 404, "404"),
        ("alert_on", [PaymentError, None], "None"),
        ("alert_on", when(int, bool), "<class 'int'>"),
        ("broker_rules", "no", "'no'"),
        ("after_discard", "notify", "'notify'"),
        ("after_discard", later, repr(later)),
        ("retry_when", later, repr(later)),
        ("dead_letter_discards", 1, "1"),
        ("tags", {"team": 5}, "{'team': 5}"),
        ("tags", ["billing"], "['billing']"),
        ("throws", "ValueError", "'ValueError'"),
        ("throws", [ValueError, 5], "[<class 'ValueError'>, 5]"),
        ("timeout", -1, "-1"),
        ("timeout", "30s", "'30s'"),
        ("queue_timeout", 0, "0"),
        ("retry_on", {(): 3}, "()"),
        ("discard_on", when((), bool), f"When(exceptions=(), predicate={bool!r})"),
        ("after_discard", lambda: None, None),
        ("after_discard", made_one_by_one, repr(made_one_by_one)),
        ("retry_when", lambda retries: True, None),
        ("done_when", made_one_by_one, repr(made_one_by_one)),
        ("max_retries", "3", "'3'"),
        ("max_retries", True, "True"),
        ("max_retries", math.nan, "nan"),
        ("min_backoff", None, "None"),
        ("min_backoff", -1, "-1"),
        ("max_backoff", "1h", "'1h'"),
        ("max_age", math.inf, "inf"),
        ("on_retry_exhausted", len, repr(len)),
        ("on_success", len, repr(len)),
        ("on_failure", 5, "5"),
        pytest.param("timeout", 10**5_000, "a int", id="timeout-five thousand digits"),
        ("idempotency_ttl", timedelta.max, repr(timedelta.max)),
    ],
    # The same in every process that collects the tests.
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_a_bad_declaration_names_actor_option_expected_and_got(option, value, got):
    stage = Stage()
    with pytest.raises(ConfigurationError) as raised:
        failing(stage, name="send_mail", **{option: value})
    text = str(raised.value)
    assert text.startswith(f"actor 'send_mail': {option}: expected ")
    assert f", got {repr(value) if got is None else got}." in text


#: The options of dramatiq_policies, and those of Dramatiq that decide about a failed job.
_CHECKED = sorted(
    {*ACTOR_OPTIONS, "timeout", "queue_timeout", "time_limit", "max_retries", "min_backoff", "max_backoff"}
)


@pytest.mark.parametrize("option", [*_CHECKED, "max_age", "retry_when", "throws", "on_success", "on_failure"])
@pytest.mark.parametrize(
    "garbage",
    [object(), b"x", {1: 2}, [5], timedelta(-1), date(2026, 1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_garbage_in_any_option_is_an_error_that_names_actor_option_expected_and_got(option, garbage):
    with pytest.raises(ConfigurationError, match=rf"^actor 'send_mail': {option}: expected .*, got "):
        failing(Stage(), name="send_mail", **{option: garbage})


@pytest.mark.parametrize("option", ["on_success", "on_failure", "on_retry_exhausted"])
def test_a_callback_may_be_an_actor_as_in_the_options_of_a_message(option):
    stage, called = Stage(), []
    after = stage.actor(lambda *_: called.append(option), actor_name="after")

    @stage.actor(max_retries=0, **{option: after})
    def job():
        if option != "on_success":
            raise ValueError

    job.send()
    drain(stage.broker)
    assert called == [option]


def test_an_option_that_can_t_even_be_looked_at_is_refused_and_not_left_to_dramatiq_which_would_go_on():
    class Hostile(dict):
        def items(self):
            raise RuntimeError("no")

    with pytest.raises(ConfigurationError, match=r"actor 'pay': its options can't be read \(RuntimeError: no\)"):
        failing(Stage(), tags=Hostile())


def test_stock_s_options_may_be_timedeltas_and_a_retry_without_end_stays_one():
    stage = Stage()

    @stage.actor(min_backoff=timedelta(milliseconds=1), max_backoff=timedelta(milliseconds=2), max_retries=1)
    def pay():
        raise PaymentError

    pay.send()
    stage.run()
    assert stage.outcomes() == ["retried", "dead"]
    assert stage.events[0].delay_ms <= 2
    stage.actor(lambda: None, actor_name="endless", max_retries=math.inf, max_age=timedelta(hours=1), max_backoff=7)
    assert stage.broker.actors["endless"].options["max_age"] == 3_600_000


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_retries", "3"),
        ("min_backoff", -1),
        ("max_backoff", "1h"),
        ("retry_when", len),
        ("on_outcome", [lambda: 1]),
    ],
)
def test_a_bad_argument_of_the_middleware_is_refused(argument, value):
    with pytest.raises(ConfigurationError, match=f"ErrorClassifier: {argument}: expected .*, got "):
        ErrorClassifier(**{argument: value})
    assert ErrorClassifier(min_backoff=timedelta(seconds=1)).min_backoff == 1_000


def test_a_class_under_two_verbs_of_an_actor_is_refused():
    with pytest.raises(ConfigurationError, match=r"actor 'pay': alert_on: expected each class once"):
        failing(Stage(), retry_on=PaymentError, alert_on=PaymentError)


def test_an_actor_that_was_refused_can_be_declared_again():
    stage = Stage()
    with pytest.raises(ConfigurationError):
        failing(stage, retry_on=5)
    failing(stage, PaymentError(), retry_on={PaymentError: SOON}).send()
    assert stage.run().outcomes() == ["retried", "succeeded"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("retry_on", 5),
        ("unclassified", 5),
        ("max_attempts", 0),
        ("max_attempts", True),
        ("alert_interval", -1),
        ("max_snooze", "1h"),
        ("after_discard", later),
        ("retry_when", later),
        ("on_outcome", later),
        ("on_outcome", [print, 5]),
        ("dead_letter_discards", "yes"),
    ],
)
def test_a_bad_argument_of_the_classifier_is_a_configuration_error(argument, value):
    with pytest.raises(ConfigurationError, match=rf"ErrorClassifier: {argument}: expected .*, got "):
        ErrorClassifier(**{argument: value})


def test_the_defaults_are_those_that_are_documented():
    ours = ErrorClassifier()
    assert (ours.max_attempts, ours.alert_interval, ours.max_snooze) == (25, 300_000, 7 * 24 * 3_600_000)
    assert ours.dead_letter_discards is False


def test_a_cap_of_one_attempt_allows_no_retry():
    assert ErrorClassifier(max_attempts=1).max_attempts == 1


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match=r"^ErrorClassifier\(\) got an unexpected keyword argument 'retries'$"):
        ErrorClassifier(retries=5)


def test_an_unknown_actor_option_is_refused_by_dramatiq():
    with pytest.raises(ValueError, match="retry_of"):
        failing(Stage(), retry_of=PaymentError)


def test_a_class_based_actor_declares_its_rules_in_its_meta():
    stage = Stage()

    class Pay(dramatiq.GenericActor):
        class Meta:
            broker = stage.broker
            discard_on = CardDeclined
            tags = {"team": "billing"}  # noqa: RUF012

        def perform(self):
            raise CardDeclined

    Pay.send()
    assert stage.run().outcomes() == ["discarded"]
    assert stage.events[0].tags == {"team": "billing"}
