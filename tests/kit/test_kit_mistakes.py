"""Common mistakes in tests with the kit: each error says what to do."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import ConfigurationError, install
from dramatiq_policies.testing import assert_crash_safe, crash, drain, fail, hang, perform, stub


@pytest.fixture
def broker():
    return install(StubBroker())


@pytest.fixture
def send_mail(broker):
    return dramatiq.actor(lambda order_id: None, actor_name="send_mail", broker=broker)


def a_function():
    pass


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("perform()", lambda given: perform(given, 7)),
        ("fail()", lambda given: fail(given, OSError)),
        ("hang()", hang),
        ("crash()", crash),
        ("assert_crash_safe()", lambda given: assert_crash_safe(given, effects=list, reset=list)),
    ],
)
@pytest.mark.parametrize("given", [a_function, "send_mail", None])
def test_a_function_or_a_name_in_place_of_an_actor_is_an_error_that_says_so(name, use, given):
    with pytest.raises(
        ConfigurationError, match=r"actor: expected an actor, got .* Pass what @dramatiq\.actor returns"
    ) as caught:
        use(given)
    assert str(caught.value).startswith(f"{name}: ")


def test_a_run_is_asked_about_an_actor_of_another_broker(broker, send_mail):
    with pytest.raises(ValueError, match=r"no actor 'send_mail': it is declared on another broker\. Drain that broker"):
        drain(install(StubBroker())).assert_outcomes(send_mail, "succeeded")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (None, "got a NoneType. Use `with stub() as broker:`"),
        (RedisBroker(url="redis://localhost:1"), "got a RedisBroker. Use `with stub() as broker:`"),
        (StubBroker(), "Call install(broker) before you declare actors"),
    ],
    ids=["no broker", "a real broker", "a broker without install()"],
)
def test_a_broker_that_can_t_be_drained_is_an_error_with_advice(given, advice):
    with pytest.raises(ConfigurationError) as caught:
        drain(given)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("use", "start"),
    [
        (lambda broker, actor: drain(broker, max_runs="many"), "drain(): max_runs: expected an int"),
        (lambda broker, actor: drain(broker, until="soon"), "drain(): until: expected a timedelta or milliseconds"),
        (lambda broker, actor: stub("broker").__enter__(), "stub(): broker: expected a broker"),
        (lambda broker, actor: fail(actor, "OSError"), "fail('send_mail'): exception: expected an exception"),
        (lambda broker, actor: fail(actor, OSError, times=-1), "fail('send_mail'): times: expected an int"),
        (
            lambda broker, actor: assert_crash_safe(actor, effects=[], reset=list),
            "assert_crash_safe(): effects: expected",
        ),
        (
            lambda broker, actor: assert_crash_safe(actor, effects=list, reset=[]),
            "assert_crash_safe(): reset: expected",
        ),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(use, start, broker, send_mail):
    with pytest.raises(ConfigurationError) as caught:
        use(broker, send_mail)
    assert str(caught.value).startswith(start)


def test_an_async_actor_without_its_middleware_names_the_middleware(broker):
    async def send(order_id):
        pass

    actor = dramatiq.actor(send, broker=broker)
    assert "AsyncIO" in str(perform(actor, 7).exception)


def test_a_pipeline_whose_first_step_fails_shows_the_failure_of_that_step(broker, send_mail):
    @dramatiq.actor(broker=broker, discard_on=ValueError)
    def charge():
        raise ValueError("no such order")

    dramatiq.pipeline([charge.message(), send_mail.message()], broker=broker).run()
    with pytest.raises(
        AssertionError, match=r"send_mail: expected succeeded, got no delivery(.|\n)*ValueError: no such order"
    ):
        drain(broker).assert_outcomes(send_mail, "succeeded")
