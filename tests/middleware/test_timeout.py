from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import FrozenInstanceError
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from dramatiq import Message
from dramatiq.middleware import Middleware, TimeLimit
from dramatiq.middleware import ShutdownNotifications as StockShutdownNotifications

from dramatiq_policies.delivery import limits
from dramatiq_policies.delivery.delivery import FINISHED, RUNNING, Delivery
from dramatiq_policies.delivery.limits import check_timeouts, expired_after, timeout_of, warn_if_close
from dramatiq_policies.errors import ConfigurationError
from dramatiq_policies.interrupts import threads as interrupts
from dramatiq_policies.middleware.shutdown import ShutdownNotifications
from dramatiq_policies.middleware.timeout import STUCK_EXIT_CODE, StuckJob, Timeout

INF = float("inf")
NO_DURATIONS = [0, -1, -0.5, float("nan"), True, False, "30", "x", [], {}, 10**400, -INF, timedelta(0)]


@pytest.fixture(autouse=True)
def warned_anew():
    limits._warned.clear()


def message(timestamp=1_700_000_000_000, **options):
    return Message("default", "mail", (), {}, options, message_timestamp=timestamp)


# --- the middleware -------------------------------------------------------------------------------------------------


def test_a_timeout_is_a_time_limit_without_a_thread_and_without_message_hooks():
    middleware = Timeout()
    assert isinstance(middleware, TimeLimit)
    assert not hasattr(middleware, "manager")
    for hook in ("before_process_message", "after_process_message", "after_skip_message"):
        assert getattr(Timeout, hook) is getattr(Middleware, hook)
        assert getattr(ShutdownNotifications, hook) is getattr(Middleware, hook)


def test_a_timeout_knows_the_stock_option_and_its_own():
    assert Timeout().actor_options >= {"time_limit", "timeout", "queue_timeout"}


def test_the_default_is_stock_s_ten_minutes():
    assert Timeout().resolve({}) == (600_000, None)


def test_the_stock_argument_is_the_default_where_ours_is_not_given():
    assert Timeout(time_limit=5_000, interval=100).resolve({}) == (5_000, None)
    assert Timeout(time_limit=5_000, default=7_000).resolve({}) == (7_000, None)
    assert Timeout(time_limit=INF).resolve({}) == (None, None)


def test_arguments_may_be_timedeltas():
    middleware = Timeout(
        default=timedelta(minutes=1), queue_default=timedelta(hours=1), grace=timedelta(seconds=1), on_stuck=print
    )
    assert middleware.resolve({}) == (60_000, 3_600_000)
    assert middleware.grace == 1


@pytest.mark.parametrize("value", NO_DURATIONS)
@pytest.mark.parametrize("argument", ["default", "queue_default", "time_limit"])
def test_an_argument_that_is_no_duration_is_refused(argument, value):
    with pytest.raises(ConfigurationError, match=f"^Timeout: {argument}: expected milliseconds or a timedelta"):
        Timeout(**{argument: value})


@pytest.mark.parametrize("value", [-1, INF, "5", None, True])
def test_a_grace_that_is_no_finite_duration_is_refused(value):
    with pytest.raises(ConfigurationError, match="Timeout: grace: expected"):
        Timeout(grace=value)


async def coroutine_function(record):
    pass


@pytest.mark.parametrize("value", ["kill", None, 3, coroutine_function, lambda: None])
def test_an_unknown_way_to_deal_with_stuck_jobs_is_refused(value):
    with pytest.raises(ConfigurationError, match="Timeout: on_stuck: expected 'log', 'exit' or a callable"):
        Timeout(on_stuck=value)


# --- an actor's options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["timeout", "time_limit", "queue_timeout"])
@pytest.mark.parametrize("value", [1, 0.5, 30_000, timedelta(seconds=3), timedelta(days=7), INF, None])
def test_durations_are_valid(option, value):
    check_timeouts("actor 'mail'", {option: value})


@pytest.mark.parametrize("option", ["timeout", "time_limit", "queue_timeout"])
@pytest.mark.parametrize("value", NO_DURATIONS)
def test_an_option_that_is_no_duration_is_refused_with_the_actor_s_name(option, value):
    with pytest.raises(ConfigurationError, match=f"^actor 'mail': {option}: expected milliseconds or a timedelta"):
        check_timeouts("actor 'mail'", {option: value})


@pytest.mark.parametrize("option", ["timeout", "queue_timeout"])
def test_more_than_a_week_is_refused(option):
    with pytest.raises(ConfigurationError, match="at most 7 days"):
        check_timeouts("actor 'mail'", {option: timedelta(days=7, milliseconds=1)})


def test_stock_s_option_has_no_upper_bound():
    check_timeouts("actor 'mail'", {"time_limit": timedelta(days=365)})
    assert Timeout().resolve({"time_limit": timedelta(days=365)})[0] == 365 * 86_400_000
    with pytest.raises(ConfigurationError, match="more than 0, or"):
        check_timeouts("actor 'mail'", {"time_limit": 0})


def test_both_names_at_once_are_refused():
    with pytest.raises(ConfigurationError, match="actor 'mail': timeout: expected either timeout or time_limit"):
        check_timeouts("actor 'mail'", {"timeout": 1, "time_limit": 1})
    check_timeouts("actor 'mail'", {"timeout": 1, "time_limit": None})


def test_an_actor_s_own_options_come_before_the_defaults():
    middleware = Timeout(default=1_000, queue_default=2_000)
    assert middleware.resolve({}) == (1_000, 2_000)
    assert middleware.resolve({"timeout": None, "queue_timeout": None}) == (1_000, 2_000)
    assert middleware.resolve({"timeout": 5, "queue_timeout": timedelta(seconds=1)}) == (5, 1_000)
    assert middleware.resolve({"time_limit": 7}) == (7, 2_000)
    assert middleware.resolve({"timeout": INF, "queue_timeout": INF}) == (None, None)


# --- a message's options --------------------------------------------------------------------------------------------


def test_without_options_the_actor_s_limit_counts():
    assert timeout_of({"retries": 1}, 30_000, "mail") == 30_000
    assert timeout_of({}, None, "mail") is None


@pytest.mark.parametrize("option", ["timeout", "time_limit"])
def test_a_message_s_own_limit_comes_first(option):
    assert timeout_of({option: 5}, 30_000, "mail") == 5
    assert timeout_of({option: 5}, None, "mail") == 5
    assert timeout_of({option: INF}, 30_000, "mail") is None
    assert timeout_of({option: None}, 30_000, "mail") == 30_000


def test_our_option_of_a_message_counts_before_dramatiq_s():
    assert timeout_of({"timeout": 5, "time_limit": 7}, 30_000, "mail") == 5
    assert timeout_of({"timeout": 0, "time_limit": 7}, 30_000, "mail") == 7


def test_no_limit_survives_the_way_through_json():
    assert timeout_of(json.loads(json.dumps({"timeout": INF})), 30_000, "mail") is None


@pytest.mark.parametrize("option", ["timeout", "time_limit"])
@pytest.mark.parametrize("value", NO_DURATIONS)
def test_an_option_that_is_no_duration_is_ignored_with_one_warning(caplog, option, value):
    for _ in range(3):
        assert timeout_of({option: value}, 30_000, "mail") == 30_000
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"actor mail has {option}=" in record.getMessage()


def test_each_actor_and_option_has_a_warning_of_its_own(caplog):
    for actor in ("mail", "push", "mail"):
        timeout_of({"timeout": 0, "time_limit": -1}, 30_000, actor)
    assert len(caplog.records) == 4


def test_a_message_s_absurd_timeout_is_ignored():
    assert timeout_of({"timeout": 8 * 86_400_000}, 30_000, "mail") == 30_000


# --- waiting too long -----------------------------------------------------------------------------------------------

NOW = 1_700_000_060_000


def test_a_message_that_waited_longer_than_it_may_is_expired():
    assert expired_after(message(ready_at=NOW - 1_001), 1_000, NOW) == 1_001
    assert expired_after(message(ready_at=NOW - 1_000), 1_000, NOW) is None


def test_without_a_queue_timeout_nothing_expires():
    assert expired_after(message(ready_at=1), None, NOW) is None


def test_the_queue_timeout_counts_from_when_the_message_became_ready_and_not_from_when_it_was_made():
    assert expired_after(message(timestamp=NOW - 10_000, ready_at=NOW - 10), 1_000, NOW) is None
    assert expired_after(message(timestamp=NOW - 10, ready_at=NOW - 10_000), 1_000, NOW) == 10_000


def test_a_message_of_stock_dramatiq_s_is_ready_since_it_was_made():
    assert expired_after(message(timestamp=NOW - 2_000), 1_000, NOW) == 2_000
    assert expired_after(message(timestamp=NOW - 500), 1_000, NOW) is None


@pytest.mark.parametrize("options", [{"retries": 1}, {"policies": {"total": 1}}, {"policies": {"snoozed_since": 1}}])
@pytest.mark.parametrize("ready", [{}, {"ready_at": NOW - 10_000}])
def test_a_message_that_was_run_before_never_expires(options, ready):
    assert expired_after(message(timestamp=NOW - 10_000, **options, **ready), 1_000, NOW) is None


def test_a_message_that_was_not_run_expires_with_empty_counters_too():
    assert expired_after(message(retries=0, ready_at=NOW - 10_000), 1_000, NOW) == 10_000


def test_a_producer_s_clock_that_is_ahead_never_makes_a_message_expire():
    assert expired_after(message(ready_at=NOW + 3_600_000), 1_000, NOW) is None


@pytest.mark.parametrize("stamp", ["x", True, [], {}, float("nan"), -1, 0, 1, 1_700_000_000, INF, -INF])
def test_a_stamp_that_is_no_time_never_makes_a_message_expire(stamp):
    assert expired_after(message(ready_at=stamp), 1_000, NOW) is None
    assert expired_after(message(timestamp=stamp), 1_000, NOW) is None


# --- a job that was close -------------------------------------------------------------------------------------------


def delivery_that_ran(ms, limit):
    delivery = Delivery(None, message())
    delivery.timeout_ms = limit
    delivery.started, delivery.ended, delivery.stage = 100.0, 100.0 + ms / 1_000, FINISHED
    return delivery


def test_a_job_that_used_over_four_fifths_of_its_timeout_is_warned_of_once(caplog):
    delivery = delivery_that_ran(8_001, 10_000)
    warn_if_close(delivery)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dramatiq_policies.outcomes", "WARNING")
    assert "ran for 8 s: 80 % of its timeout of 10 s" in record.getMessage()
    assert (record.actor, record.queue, record.message_id) == ("mail", "default", delivery.message.message_id)
    assert record.timeout_ms == 10_000
    assert record.duration_ms == pytest.approx(8_001)


@pytest.mark.parametrize(("ms", "limit"), [(7_999, 10_000), (8_000, 10_000), (10_000, None), (0, 1)])
def test_other_jobs_are_not(caplog, ms, limit):
    warn_if_close(delivery_that_ran(ms, limit))
    assert caplog.records == []


# --- stuck jobs -----------------------------------------------------------------------------------------------------


def stuck_delivery():
    delivery = Delivery(None, message())
    delivery.stage, delivery.started, delivery.timeout_ms = RUNNING, time.monotonic() - 1, 500.0
    return delivery


def test_a_stuck_job_is_one_critical_record_with_its_stack(caplog):
    Timeout().stuck(stuck_delivery(), 'File "jobs.py", line 1, in mail\n')
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dramatiq_policies.alerts", "CRITICAL")
    assert "Job mail" in record.getMessage()
    assert "the timeout is 500 ms" in record.getMessage()
    assert 'File "jobs.py", line 1, in mail' in record.getMessage()
    assert record.stack == 'File "jobs.py", line 1, in mail\n'
    assert (record.actor, record.queue) == ("mail", "default")


def test_a_callable_and_the_subscribers_get_a_frozen_record_in_that_order(caplog):
    seen = []
    middleware = Timeout(on_stuck=lambda record: seen.append(("on_stuck", record)))
    middleware.stuck_subscribers.append(lambda record: seen.append(("subscriber", record)))
    delivery = stuck_delivery()
    middleware.stuck(delivery, "the stack")
    assert [who for who, _ in seen] == ["subscriber", "on_stuck"]
    record = seen[0][1]
    assert isinstance(record, StuckJob)
    assert (record.actor, record.queue, record.message_id, record.stack) == (
        "mail",
        "default",
        delivery.message.message_id,
        "the stack",
    )
    assert record.elapsed_ms >= 1_000
    with pytest.raises(FrozenInstanceError):
        record.actor = "other"


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_stuck_subscriber_that_fails_is_logged_and_keeps_no_other_from_the_record(error, caplog):
    seen = []

    def fails(record):
        raise error("subscriber")

    middleware = Timeout(on_stuck=seen.append)
    middleware.stuck_subscribers.append(fails)
    middleware.stuck(stuck_delivery(), "")
    assert [r.levelname for r in caplog.records] == ["ERROR", "CRITICAL"]
    assert len(seen) == 1


APP = """
    import os, sys, threading, time
    import dramatiq
    from dramatiq.brokers.stub import StubBroker
    from dramatiq_policies import Timeout, install
    from dramatiq_policies.middleware import timeout as timeouts

    timeout = Timeout(grace=100, on_stuck="exit")

    def note(record):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(f"{record.actor} is stuck\\n")

    def hang(record):
        time.sleep(3600)

    timeout.stuck_subscribers.append(note)
    if os.environ.get("HANG"):
        timeouts._TOLD_WITHIN = 1.0
        timeout.stuck_subscribers.append(hang)
    broker = StubBroker()
    install(broker, timeout=timeout)
    dramatiq.set_broker(broker)

    @dramatiq.actor(timeout=100)
    def stuck():
        time.sleep(3600)

    @dramatiq.actor
    def neighbour():
        try:
            time.sleep(3600)
        finally:
            print("the neighbour ended", file=sys.stderr)

    neighbour.send()
    stuck.send()
"""


@pytest.mark.untraced
@pytest.mark.parametrize("hang", ["", "1"], ids=["", "a subscriber hangs"])
def test_exit_ends_the_worker_process_at_once_and_the_command_with_its_code(tmp_path, hang):
    """The real command: its master stops the other processes, and exits with the code of the one that ended."""
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "NOTES": str(tmp_path / "notes"), "HANG": hang}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "dramatiq", "app", "--processes", "1", "--threads", "2"],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, log = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            # A master that is killed leaves its worker behind.
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == STUCK_EXIT_CODE, log
    assert time.monotonic() - start < 30
    assert (tmp_path / "notes").read_text() == "stuck is stuck\n"
    assert "the neighbour ended" not in log
    if not hang:
        assert "CRITICAL" in log
        assert "in stuck\n" in log
        assert "time.sleep(3600)" in log


# --- shutdown notifications -----------------------------------------------------------------------------------------


def test_shutdown_notifications_are_stock_s_but_for_the_hooks(monkeypatch):
    calls = []
    monkeypatch.setattr(interrupts, "shutdown", lambda: calls.append(1))
    middleware = ShutdownNotifications(notify_shutdown=True)
    assert isinstance(middleware, StockShutdownNotifications)
    assert middleware.actor_options == {"notify_shutdown"}
    middleware.before_worker_shutdown(None, SimpleNamespace(consumers={}, workers=[]))
    assert calls == [1]


@pytest.mark.parametrize(
    ("default", "actor", "own", "notified"),
    [
        (False, None, None, False),
        (True, None, None, True),
        (True, False, None, False),
        (False, False, True, True),
        (True, True, False, False),
    ],
)
def test_a_message_says_first_whether_it_is_notified_then_its_actor(default, actor, own, notified):
    class Actor:
        options = {} if actor is None else {"notify_shutdown": actor}

    options = {} if own is None else {"notify_shutdown": own}
    assert ShutdownNotifications(default).should_notify(Actor, message(**options)) is notified


def test_before_the_process_exits_everybody_is_notified(monkeypatch, caplog):
    monkeypatch.setattr("dramatiq_policies.middleware.timeout._READ_WITHIN", 0)
    told, ended = [], []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append((code, *told)))
    timeout = Timeout(on_stuck="exit")
    timeout.stuck_subscribers = [lambda job: told.append(job.actor)]
    delivery = Delivery(None, Message("default", "stuck", (), {}, {}))
    delivery.timeout_ms = 100
    timeout.stuck(delivery, "in stuck")
    assert ended == [(STUCK_EXIT_CODE, "stuck")]
    assert "The worker process exits.\nin stuck" in caplog.text
