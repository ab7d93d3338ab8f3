from __future__ import annotations

import copy
import email.message
import functools
import logging
import pickle
import re
import subprocess
import sys
import urllib.error
from dataclasses import FrozenInstanceError
from datetime import datetime, timedelta, timezone, tzinfo
from email.utils import format_datetime
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_policies import ConfigurationError, constant, exponential, polynomial, retry_after
from dramatiq_policies.common.callables import is_coroutine_callable
from dramatiq_policies.common.durations import WEEK_MS
from dramatiq_policies.rules.wait import bounds_of, safe_wait

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
ERROR = ValueError()


async def coroutine_wait(attempt, exception):
    return 0


def asking(value):
    error = ValueError()
    error.retry_after = value
    return error


def asked_by_header(headers):
    error = ValueError()
    error.response = type("Response", (), {"headers": headers})()
    return error


def waits(wait, attempts=6):
    return [wait(attempt, ERROR) for attempt in range(1, attempts + 1)]


# Growing waits.


def test_exponential_doubles_up_to_its_maximum():
    assert waits(exponential(initial=1_000, maximum=10_000, jitter=0)) == [1_000, 2_000, 4_000, 8_000, 10_000, 10_000]


def test_exponential_begins_at_dramatiqs_own_fifteen_seconds():
    assert exponential(jitter=0)(1, ERROR) == 15_000


def test_polynomial_is_active_jobs_polynomially_longer():
    assert waits(polynomial(jitter=0), 4) == [3_000, 18_000, 83_000, 258_000]


def test_constant_is_always_the_same():
    assert waits(constant(timedelta(seconds=5)), 3) == [5_000, 5_000, 5_000]


def test_jitter_is_a_share_of_the_wait_added_on_top_also_of_the_maximum():
    wait = exponential(initial=1_000, maximum=4_000, jitter=0.5, random=lambda: 1.0)
    assert waits(wait, 4) == [1_500, 3_000, 6_000, 6_000]


def test_an_attempt_before_the_first_waits_as_the_first():
    def patient(attempt, exception):
        return exponential(initial=1_000, jitter=0)(attempt - 3, exception)

    assert waits(patient) == [1_000, 1_000, 1_000, 1_000, 2_000, 4_000]


def test_a_wait_that_starts_at_zero_stays_there():
    assert exponential(initial=0)(5_000, ERROR) == 0
    assert polynomial(scale=0, offset=7, jitter=0)(10**400, ERROR) == 7


@given(
    attempt=st.integers(1, 10**6),
    initial=st.integers(0, 10**12),
    maximum=st.integers(0, 10**12),
    factor=st.floats(1, 1e6),
    jitter=st.floats(0, 1),
    chance=st.floats(0, 1),
)
def test_jitter_never_shortens_a_wait_and_never_exceeds_its_share_or_a_week(
    attempt, initial, maximum, factor, jitter, chance
):
    plain = exponential(initial, maximum, factor, 0)(attempt, ERROR)
    wait = exponential(initial, maximum, factor, jitter, random=lambda: chance)(attempt, ERROR)
    assert type(wait) is int
    assert plain <= wait <= min(WEEK_MS, plain * (1 + jitter) + 1)
    assert plain <= min(maximum, WEEK_MS)


@given(attempt=st.integers(1, 10**6), power=st.floats(0, 100), scale=st.integers(0, 10**9))
def test_a_polynomial_wait_never_shrinks_with_the_attempt(attempt, power, scale):
    wait = polynomial(power, scale, jitter=0)
    assert wait(attempt, ERROR) <= wait(attempt + 1, ERROR) <= WEEK_MS


def test_nothing_is_too_large_to_be_bounded_by_a_week():
    for wait in (
        exponential(maximum=10**400),
        exponential(initial=10**400),
        exponential(factor=sys.float_info.max),
        polynomial(scale=10**400, maximum=10**400),
        constant(10**400),
        retry_after(fallback=1, maximum=10**400),
    ):
        assert 0 <= wait(10**6, asking(10**400)) <= WEEK_MS
        assert bounds_of(wait, 10**6)[1] == WEEK_MS


def test_a_drawn_wait_lies_within_the_bounds():
    for chance in (0.0, 0.5, 0.999):
        wait = exponential(initial=1_000, maximum=4_000, random=lambda: chance)  # noqa: B023
        assert [wait.bounds(attempt) for attempt in (1, 2, 3, 4)] == [
            (1_000, 1_150),
            (2_000, 2_300),
            (4_000, 4_600),
            (4_000, 4_600),
        ]
        assert all(
            low <= drawn <= high for drawn, (low, high) in zip(waits(wait), map(wait.bounds, range(1, 7)), strict=True)
        )


def test_the_bounds_of_any_wait_are_known_as_far_as_they_can_be():
    assert bounds_of(constant(5), 3) == (5, 5)
    assert bounds_of(retry_after(fallback=5, maximum=60_000), 1) == (0, 69_000)
    assert bounds_of(retry_after(fallback=5, maximum=60_000, jitter=0), 1) == (0, 60_000)
    assert bounds_of(retry_after(fallback=90_000, maximum=60_000), 1) == (0, 90_000)
    assert bounds_of(retry_after(fallback=exponential(1_000, jitter=0.5), maximum=0), 2) == (0, 3_000)
    assert bounds_of(lambda attempt, exception: 5, 1) == (0, WEEK_MS)


def test_a_wait_prints_as_it_is_declared():
    fallback = "exponential(initial=2000, maximum=60000, factor=3, jitter=0.2)"
    declared = f"retry_after(fallback={fallback}, maximum=5000, jitter=0.15)"
    assert repr(eval(declared)) == declared
    assert repr(constant(timedelta(seconds=2))) == "constant(ms=2000)"
    assert repr(polynomial()) == "polynomial(power=4, scale=1000, offset=2000, maximum=604800000, jitter=0.15)"


def test_waits_are_values_that_can_be_pickled():
    for wait in (exponential(initial=1_000), polynomial(power=3), constant(5), retry_after(fallback=constant(5))):
        assert pickle.loads(pickle.dumps(wait)) == wait
    assert exponential() != exponential(jitter=0)
    assert exponential() != polynomial()
    assert exponential() == ANY


def test_a_wait_can_not_be_changed():
    wait = constant(5)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'ms'"):
        wait.ms = 6
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'ms'"):
        del wait.ms
    assert wait == copy.deepcopy(wait) == constant(5)


def test_processes_forked_from_one_draw_differently():
    code = (
        "import os\n"
        "from dramatiq_policies import exponential\n"
        "wait = exponential(initial=10**8, jitter=1)\n"
        "for _ in range(2):\n"
        "    if os.fork() == 0:\n"
        "        os.write(1, b'%d\\n' % wait(1, ValueError()))\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    drawn = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split()
    assert len(drawn) == len(set(drawn)) == 2


@pytest.mark.parametrize(
    ("build", "option"),
    [
        (lambda: exponential(initial=-1), "initial"),
        (lambda: exponential(maximum="1h"), "maximum"),
        (lambda: exponential(factor=0.5), "factor"),
        (lambda: exponential(factor=float("nan")), "factor"),
        (lambda: exponential(factor=10**400), "factor"),
        (lambda: exponential(factor="2"), "factor"),
        (lambda: exponential(factor=True), "factor"),
        (lambda: exponential(jitter=1.5), "jitter"),
        (lambda: exponential(jitter="15%"), "jitter"),
        (lambda: exponential(jitter=-0.1), "jitter"),
        (lambda: exponential(jitter=True), "jitter"),
        (lambda: polynomial(power=-1), "power"),
        (lambda: polynomial(scale=None), "scale"),
        (lambda: polynomial(offset=-5), "offset"),
        (lambda: polynomial(maximum=-5), "maximum"),
        (lambda: constant(-1), "ms"),
        (lambda: constant(float("inf")), "ms"),
        (lambda: retry_after(maximum=-1), "maximum"),
        (lambda: retry_after(jitter=2), "jitter"),
        (lambda: retry_after(fallback="soon"), "fallback"),
        (lambda: retry_after(fallback=-1), "fallback"),
        (lambda: retry_after(fallback=coroutine_wait), "fallback"),
        (lambda: retry_after(fallback=lambda attempt: 5), "fallback"),
    ],
)
def test_an_argument_out_of_range_is_a_configuration_error_that_names_it(build, option):
    with pytest.raises(ConfigurationError, match=rf"\(\): {option}: expected .*, got "):
        build()


# Waits that the other side asks for.


@pytest.mark.parametrize(
    "error",
    [
        asking(7),
        asking(7.0),
        asking(6.9999),
        asking("7"),
        asking(b" 7 "),
        asking(timedelta(seconds=7)),
        asking(NOW + timedelta(seconds=7)),
        asking((NOW + timedelta(seconds=7)).replace(tzinfo=None)),
        asking((NOW + timedelta(seconds=7)).astimezone(timezone(timedelta(hours=5)))),
        asking(format_datetime(NOW + timedelta(seconds=7), usegmt=True)),
        asked_by_header({"retry-after": "7"}),
        asked_by_header({"RETRY-AFTER": "7"}),
        asked_by_header([("Date", "now"), ("Retry-After", "7")]),
        asked_by_header([(b"Retry-After", b"7")]),
    ],
    ids=lambda error: re.sub(r" at 0x\w+", "", repr(vars(error))),
)
def test_retry_after_waits_as_long_as_the_server_asks_and_never_less(error):
    assert 7_000 - 1 <= retry_after(jitter=0, now=lambda: NOW)(1, error) <= 7_000


def test_headers_need_be_no_mapping_as_those_of_urllib_are_not():
    headers = email.message.Message()
    headers["Retry-After"] = "3"
    assert retry_after(jitter=0)(1, urllib.error.HTTPError("http://mail", 429, "", headers, None)) == 3_000


def test_a_header_whose_name_is_no_text_is_passed_over():
    assert retry_after(jitter=0)(1, asked_by_header({None: "5", "Retry-After": "3"})) == 3_000


def test_the_errors_own_headers_count_where_it_has_no_response():
    error = ValueError()
    error.headers = {"Retry-After": "3"}
    assert retry_after(jitter=0)(1, error) == 3_000


@pytest.mark.parametrize("nothing", ["nan", float("nan"), float("inf"), "inf", True])
def test_a_retry_after_that_is_no_length_of_time_is_ignored(nothing):
    assert retry_after(fallback=7)(1, asking(nothing)) == 7


def test_a_retry_after_in_an_invalid_time_zone_is_ignored():
    assert retry_after(fallback=7)(1, asking(NOW.replace(tzinfo=tzinfo()))) == 7


def test_a_retry_after_unreadable_in_one_place_is_looked_for_in_the_next():
    error = asked_by_header({"Retry-After": "3"})
    error.retry_after = "when it suits you"
    assert retry_after(jitter=0)(1, error) == 3_000


def test_a_time_that_has_passed_is_no_wait_at_all():
    wait = retry_after(jitter=0, now=lambda: NOW)
    assert wait(1, asking(NOW - timedelta(days=1))) == 0
    assert wait(1, asking(-5)) == 0


def test_a_date_is_counted_from_now():
    assert 50_000 < retry_after(jitter=0)(1, asking(datetime.now(timezone.utc) + timedelta(minutes=1))) <= 60_000


def test_no_more_than_the_maximum_is_granted():
    assert retry_after(jitter=0)(1, asking(86_400)) == 3_600_000
    assert retry_after(jitter=0)(1, asking("9" * 400)) == 3_600_000
    assert retry_after(maximum=timedelta(minutes=1), jitter=0)(1, asking(86_400)) == 60_000


def test_the_fallback_is_taken_where_nothing_is_logged():
    assert retry_after(fallback=constant(5))(1, ERROR) == 5
    assert retry_after(fallback=5)(1, ERROR) == 5
    assert 15_000 <= retry_after()(1, ERROR) <= 17_250


def test_retry_after_adds_jitter_upward_only_so_that_messages_do_not_come_back_at_one_moment():
    waits = {retry_after()(1, asking(10)) for _ in range(200)}
    assert len(waits) > 50
    assert 10_000 <= min(waits) <= max(waits) <= 11_500
    assert retry_after(jitter=0.5, random=lambda: 1.0)(1, asking(10)) == 15_000
    assert retry_after(random=lambda: 1.0)(1, asking(0)) == 0
    assert retry_after(maximum=10_000, random=lambda: 1.0)(1, asking(60)) == 11_500


@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**400, -(10**400)]),
        st.floats(),
        st.text(),
        st.binary(),
        st.datetimes(timezones=st.none() | st.just(timezone.utc)),
        st.timedeltas(),
        st.lists(st.integers()),
        st.sampled_from(["nan", "inf", "-inf", "1e999", "Wed, 99 Foo 2026 99:99:99 GMT", "0" * 5_000]),
    ),
    st.booleans(),
)
def test_no_hostile_retry_after_makes_a_wait_raise(value, in_a_header):
    error = asked_by_header({"Retry-After": value}) if in_a_header else asking(value)
    wait = retry_after(fallback=1)(1, error)
    assert type(wait) is int
    assert 0 <= wait <= 3_600_000 * 1.15


def test_an_error_whose_attributes_raise_gets_the_fallback():
    class Broken(Exception):
        @property
        def retry_after(self):
            raise RuntimeError

        @property
        def response(self):
            raise KeyError

        headers = 5

    assert retry_after(fallback=1)(1, Broken()) == 1


# The user's own.


@pytest.mark.parametrize("rubbish", [None, "5", -1, float("nan"), float("inf"), True, object()])
def test_a_wait_that_returns_rubbish_is_logged_and_exponential_taken_instead(rubbish, caplog):
    assert 30_000 <= safe_wait(lambda attempt, exception: rubbish, 2, ERROR) <= 34_500
    assert "the job waits by exponential()" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


def test_a_wait_that_raises_is_logged_and_exponential_taken_instead(caplog):
    assert 15_000 <= safe_wait(lambda attempt, exception: 1 // 0, 1, ERROR) <= 17_250
    assert "ZeroDivisionError" in caplog.text


def test_no_wait_is_longer_than_dramatiq_can_delay():
    assert safe_wait(lambda attempt, exception: timedelta(days=30), 1, ERROR) == WEEK_MS
    assert safe_wait(constant(10**400), 1, ERROR) == WEEK_MS


def test_a_coroutine_function_is_known_through_partials_and_objects():
    class Waiter:
        async def __call__(self, attempt, exception):
            return 0

    assert is_coroutine_callable(coroutine_wait)
    assert is_coroutine_callable(functools.partial(functools.partial(coroutine_wait, 1), None))
    assert is_coroutine_callable(Waiter())
    assert is_coroutine_callable(functools.partial(Waiter(), 1))
    assert not is_coroutine_callable(Waiter)
    assert not is_coroutine_callable(constant(1))


@pytest.mark.parametrize("wait", [exponential, polynomial])
def test_two_waits_with_different_sources_of_randomness_are_equal(wait):
    one, other = wait(random=lambda: 0.0), wait(random=lambda: 1.0)
    assert (one, hash(one), repr(one)) == (other, hash(other), repr(other))
    assert wait(jitter=0.1) != wait(jitter=0.2)


def test_two_waits_with_different_clocks_are_equal():
    assert retry_after(now=lambda: NOW) == retry_after()
