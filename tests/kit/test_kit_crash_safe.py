"""`assert_crash_safe`: a crash at every line of a job, and what that does to its effects."""

from __future__ import annotations

import asyncio
import functools
import re
import sys

import dramatiq
import dramatiq.broker
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO

from dramatiq_policies import current_job, install
from dramatiq_policies.testing import assert_crash_safe


class Shop:
    def __init__(self):
        self.reset()

    def reset(self):
        self.mails = []
        self.sent = set()

    def mail(self, order_id):
        self.mails.append(order_id)

    def mail_once(self, order_id, key):
        if key not in self.sent:
            self.sent.add(key)
            self.mails.append(order_id)


@pytest.fixture
def shop():
    return Shop()


@pytest.fixture(params=[StubBroker, functools.partial(RedisBroker, url="redis://127.0.0.1:1/0")])
def actor(request):
    broker = request.param()
    broker.add_middleware(AsyncIO())
    return functools.partial(dramatiq.actor, broker=install(broker))


@pytest.fixture
def check(shop):
    return functools.partial(assert_crash_safe, effects=lambda: shop.mails, reset=shop.reset)


def blamed(error):
    """The source lines that it names."""
    return re.findall(r"\.py:\d+: (.*)", str(error.value))


def test_the_line_between_the_mail_and_the_sentinel_is_named(actor, shop, check):
    @actor
    def confirm(order_id):
        if order_id in shop.sent:
            return
        shop.mail(order_id)
        shop.sent.add(order_id)

    with pytest.raises(AssertionError, match="confirm is not crash-safe") as error:
        check(confirm, 7)
    assert blamed(error) == ["shop.sent.add(order_id)"]
    assert "effects() is [7, 7]" in str(error.value)
    assert "Without a crash, effects() is [7]" in str(error.value)
    assert "delivered twice" not in str(error.value)


def test_a_job_that_is_a_function_with_some_arguments_given_is_looked_into(actor, shop, check):
    def confirm(mail, order_id):
        mail(order_id)
        shop.sent.add(order_id)

    with pytest.raises(AssertionError, match="confirm is not crash-safe") as error:
        check(actor(functools.partial(confirm, shop.mail), actor_name="confirm"), 7)
    assert blamed(error) == ["shop.sent.add(order_id)"]


def test_effects_that_can_not_be_copied_are_compared_as_they_are(actor, shop, check):
    class Mails:
        def __init__(self):
            self.count = len(shop.mails)

        def __eq__(self, other):
            return self.count == other.count

        __hash__ = None

        def __deepcopy__(self, memo):
            raise TypeError("it holds a connection")

    @actor
    def confirm(order_id):
        shop.mail(order_id)
        shop.sent.add(order_id)

    with pytest.raises(AssertionError, match="confirm is not crash-safe") as error:
        check(confirm, 7, effects=Mails)
    assert blamed(error) == ["shop.sent.add(order_id)"]


def test_a_service_that_knows_the_key_makes_the_job_safe(actor, shop, check):
    @actor
    def confirm(order_id):
        shop.mail_once(order_id, current_job().idempotency_key)

    check(confirm, 7)


def test_a_sentinel_before_the_mail_loses_it(actor, shop, check):
    @actor
    def confirm(order_id):
        if order_id in shop.sent:
            return
        shop.sent.add(order_id)
        shop.mail(order_id)

    with pytest.raises(AssertionError) as error:
        check(confirm, 7)
    assert blamed(error) == ["shop.mail(order_id)"]
    assert "effects() is []" in str(error.value)


def test_a_key_helps_against_a_duplicate_and_not_against_a_crash_after_the_effect(actor, shop, check):
    @actor
    def careless(order_id):
        shop.mail(order_id)

    with pytest.raises(AssertionError) as error:
        check(careless, 7)
    assert "after the last line of the job" in str(error.value)
    assert "its message is delivered twice" in str(error.value)

    @actor(idempotency_key="{order_id}")
    def keyed(order_id):
        shop.mail(order_id)

    with pytest.raises(AssertionError) as error:
        check(keyed, 7)
    assert "after the last line of the job" in str(error.value)
    assert "delivered twice" not in str(error.value)


def test_done_when_is_asked_anew_after_the_crash(actor, shop, check):
    @actor(done_when=lambda order_id: bool(shop.mails))
    def confirm(order_id):
        shop.mail(order_id)

    check(confirm, order_id=7)


def test_a_loop_is_crashed_in_its_later_rounds_too(actor, shop, check):
    @actor
    def confirm_all(order_ids):
        for order_id in order_ids:
            if order_id not in shop.sent:
                shop.mail(order_id)
                shop.sent.add(order_id)
        shop.sent.clear()
        shop.sent.update(order_ids)

    with pytest.raises(AssertionError) as error:
        check(confirm_all, [1, 2, 3])
    assert "(time 3)" in str(error.value)
    assert set(blamed(error)) == {"shop.sent.add(order_id)", "shop.sent.update(order_ids)"}


def test_async_jobs_are_crashed_at_their_lines(actor, shop, check):
    @actor
    async def confirm(order_id):
        if order_id in shop.sent:
            return
        await asyncio.sleep(0)
        shop.mail(order_id)
        await asyncio.sleep(0)
        shop.sent.add(order_id)

    with pytest.raises(AssertionError) as error:
        check(confirm, 7)
    assert blamed(error) == ["await asyncio.sleep(0)", "shop.sent.add(order_id)"]


def test_functions_within_the_job_and_class_based_actors_have_lines_too(shop, check, monkeypatch):
    monkeypatch.setattr(dramatiq.broker, "global_broker", install(StubBroker()))

    class Confirm(dramatiq.GenericActor):
        def perform(self, order_id):
            def both():
                shop.mail(order_id)
                shop.sent.add(order_id)

            if order_id not in shop.sent:
                both()

    with pytest.raises(AssertionError) as error:
        check(Confirm, 7)
    assert blamed(error) == ["shop.sent.add(order_id)"]


def test_a_decorated_function_is_crashed_at_its_own_lines(actor, shop, check):
    def logged(fn):
        @functools.wraps(fn)
        def wrapper(*args):
            return fn(*args)

        return wrapper

    @actor
    @logged
    def confirm(order_id):
        if order_id in shop.sent:
            return
        shop.mail(order_id)
        shop.sent.add(order_id)

    with pytest.raises(AssertionError) as error:
        check(confirm, 7)
    assert blamed(error) == ["shop.sent.add(order_id)"]


def test_a_job_that_catches_everything_is_dead_all_the_same(actor, shop, check):
    @actor
    def confirm(order_id):
        try:
            if order_id in shop.sent:
                return
            shop.mail(order_id)
            shop.sent.add(order_id)
        except BaseException:
            pass

    with pytest.raises(AssertionError) as error:
        check(confirm, 7)
    assert "shop.sent.add(order_id)" in blamed(error)


def test_a_job_that_fails_undisturbed_is_shown(actor, check):
    @actor(max_retries=0)
    def confirm(order_id):
        raise ZeroDivisionError

    with pytest.raises(AssertionError, match=r"does not succeed even without a crash[\s\S]*ZeroDivisionError"):
        check(confirm, 7)


def test_effects_that_see_nothing_are_warned_of_and_those_that_are_never_the_same_refused(actor, shop, check):
    @actor
    def confirm(order_id):
        shop.mail(order_id)

    with pytest.warns(UserWarning, match="does not see the job"):
        assert_crash_safe(confirm, 7, effects=lambda: 1, reset=shop.reset)
    with pytest.raises(AssertionError, match="after another"):
        assert_crash_safe(confirm, 7, effects=lambda: shop.mails, reset=lambda: None)


def test_a_trace_function_of_the_user_goes_on(actor, shop, check):
    @actor
    def confirm(order_id):
        shop.mail_once(order_id, current_job().idempotency_key)

    seen = []

    def trace(frame, event, arg):
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        check(confirm, 7)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
