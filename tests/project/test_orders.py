"""The specification of the jobs of examples/orders: written first, with the test kit, without a change in the app."""

from __future__ import annotations

import functools
import importlib
import sys

import dramatiq
import dramatiq.broker
import pytest
import sentry_sdk
from dramatiq import Worker

from dramatiq_policies import Metrics, SentryReporter
from dramatiq_policies.testing import assert_crash_safe, crash, drain, hang, redeliver, store_down, stub

from ..support import Captured, StatsdServer

ORDER = (7, "ada@example.com", "12.50 EUR")


@pytest.fixture
def app(monkeypatch):
    """Import the app as `dramatiq examples.orders.app` does; its URL leads to no Redis."""
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    monkeypatch.setenv("BROKER_URL", "redis://127.0.0.1:1/0")
    yield from import_app()


@pytest.fixture
def app_on_stub(monkeypatch):
    """Import the app with the broker of its environment variable, for a real worker."""
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    monkeypatch.setenv("BROKER_URL", "stub://")
    yield from import_app()


def import_app():
    forget_app()
    module = importlib.import_module("examples.orders.app")
    yield module
    module.broker.close()
    module.shop.uncommitted.clear()
    module.shop.imported.clear()
    forget_app()


def forget_app():
    for name in ("app", "produce"):
        sys.modules.pop(f"examples.orders.{name}", None)


@pytest.fixture
def work(app):
    """Run all that is queued, to its end."""
    with stub() as broker:
        yield functools.partial(drain, broker)


def test_a_confirmation_is_sent(app, work):
    app.send_confirmation.send(*ORDER)
    work().assert_outcomes(app.send_confirmation, "succeeded")
    assert app.gateway.sent == {"order-confirmation:7": ("ada@example.com", "Order 7: 12.50 EUR")}


def test_a_confirmation_whose_message_is_delivered_twice_runs_once(app, work):
    message = app.send_confirmation.send(*ORDER)
    with redeliver(message):
        work().assert_outcomes(app.send_confirmation, "succeeded", "duplicate")
    assert app.gateway.asked == {"order-confirmation:7": 1}


def test_two_messages_for_one_order_are_one_mail(app, work):
    app.send_confirmation.send(*ORDER)
    app.send_confirmation.send(*ORDER)
    work().assert_outcomes(app.send_confirmation, "succeeded", "duplicate")
    assert app.gateway.asked == {"order-confirmation:7": 1}


def test_a_confirmation_waits_while_the_store_that_remembers_is_down(app, work):
    app.send_confirmation.send(*ORDER)
    with store_down(dramatiq.get_broker()):
        run = work()
    assert run.reasons(app.send_confirmation) == ["store_down"]
    work().assert_outcomes(app.send_confirmation, "succeeded")


def test_a_gateway_that_times_out_is_asked_again_under_the_same_key(app, work):
    app.send_confirmation.send(7, "flaky@example.com", "12.50 EUR")
    run = work()
    run.assert_outcomes(app.send_confirmation, "retried", "succeeded")
    run.assert_waits(app.send_confirmation, 2_000, jitter=0.15)
    assert app.gateway.asked == {"order-confirmation:7": 2}
    assert len(app.gateway.sent) == 1


def test_a_gateway_that_is_down_ends_in_the_dead_letters_after_five_attempts(app, work):
    app.send_confirmation.send(7, "down@example.com", "12.50 EUR")
    run = work()
    run.assert_outcomes(app.send_confirmation, *["retried"] * 4, "dead")
    run.assert_waits(app.send_confirmation, 2_000, 4_000, 8_000, 16_000, jitter=0.15)
    run.assert_dead(app.send_confirmation, "exhausted")
    failure = run.dead[0].options["failure"]
    assert failure["exception"] == "examples.orders.gateway.EmailTimeout"
    assert failure["attempts"] == 5
    assert len(failure["history"]) == 5


def test_a_gateway_that_limits_its_rate_is_called_again_after_its_delay(app, work):
    app.gateway.retry_after = 120
    app.send_confirmation.send(7, "busy@example.com", "12.50 EUR")
    run = work()
    run.assert_outcomes(app.send_confirmation, "retried", "succeeded")
    run.assert_waits(app.send_confirmation, 120_000, jitter=0.15)


def test_an_address_that_is_rejected_is_discarded_and_logged(app, work):
    app.send_confirmation.send(7, "nobody@example.com", "12.50 EUR")
    run = work()
    run.assert_outcomes(app.send_confirmation, "discarded")
    run.assert_nothing_dead()
    assert [record.levelname for record in run.logs] == ["WARNING"]
    assert app.gateway.sent == {}


def test_an_order_that_is_not_committed_yet_is_waited_for(app, work):
    app.shop.uncommitted.add(7)
    app.send_confirmation.send(*ORDER)
    work(until=1_999).assert_outcomes(app.send_confirmation, "retried")
    app.shop.uncommitted.clear()
    work().assert_outcomes(app.send_confirmation, "succeeded")
    assert len(app.gateway.sent) == 1


def test_an_order_that_never_existed_is_discarded_after_three_tries(app, work):
    app.send_confirmation.send(app.shop.FIRST_UNKNOWN, "ada@example.com", "12.50 EUR")
    run = work()
    run.assert_outcomes(app.send_confirmation, "retried", "retried", "discarded")
    assert run.reasons(app.send_confirmation)[-1] == "exhausted"
    assert app.gateway.sent == {}


def test_a_missing_api_key_alerts_at_once_and_keeps_the_mail_for_a_replay(app, work):
    app.gateway.api_key = None
    app.send_confirmation.send(*ORDER)
    run = work()
    run.assert_outcomes(app.send_confirmation, "alerted")
    run.assert_dead(app.send_confirmation, None)
    (alert,) = run.logs
    assert alert.levelname == "CRITICAL"
    assert alert.tags == {"team": "checkout", "criticality": "high"}


def test_a_gateway_that_hangs_is_left_at_the_timeout_and_asked_once_more(app, work):
    app.send_confirmation.send(*ORDER)
    with hang(app.send_confirmation):
        run = work()
    run.assert_outcomes(app.send_confirmation, "retried", "dead")
    assert run.dead[0].options["failure"]["exception"] == "dramatiq_policies.errors.TimeoutExceeded"
    assert run.elapsed == 30_000 + run.waits()[0] + 30_000


def test_a_confirmation_that_waited_for_over_an_hour_is_still_sent(app, work):
    app.send_confirmation.send_with_options(args=ORDER, timeout=3_600_001)
    app.send_confirmation.send(8, "ada@example.com", "1.00 EUR")
    with hang(app.send_confirmation, times=1):
        run = work()
    run.assert_outcomes(app.send_confirmation, "retried", "succeeded", "succeeded")
    assert run.elapsed > 3_600_000


def test_the_gateway_gets_no_more_time_than_the_job_has_left(app, work):
    app.send_confirmation.send_with_options(args=ORDER, timeout=400)
    work()
    (timeout_ms,) = app.gateway.timeouts
    assert 0 < timeout_ms <= 400


def test_a_confirmation_whose_worker_dies_is_sent_by_another(app, work):
    app.send_confirmation.send(*ORDER)
    with crash(app.send_confirmation, times=2):
        work().assert_outcomes(app.send_confirmation, "succeeded")
    assert len(app.gateway.sent) == 1


def test_a_confirmation_may_lose_its_worker_at_any_line(app):
    assert_crash_safe(
        app.send_confirmation,
        *ORDER,
        effects=lambda: list(app.gateway.sent.values()),
        reset=app.gateway.sent.clear,
    )


def test_an_import_may_lose_its_worker_at_any_line(app):
    assert_crash_safe(app.import_orders, 1, 250, effects=lambda: app.shop.imported, reset=app.shop.imported.clear)


def test_a_confirmation_called_directly_needs_no_worker(app):
    app.send_confirmation(*ORDER)
    assert list(app.gateway.sent) == ["order-confirmation:7"]


def test_an_import_is_cut_into_batches_and_run_twice_writes_the_same(app, work):
    app.import_orders.send(1, 250)
    app.import_orders.send(1, 250)
    run = work()
    assert sorted(app.shop.imported) == list(range(1, 251))
    assert set(run.outcomes(app.import_batch)) == {"succeeded"}


def test_a_batch_with_a_bad_row_is_kept_for_a_look(app, work):
    app.import_batch.send(-2_000, -1_999)
    run = work()
    run.assert_outcomes(app.import_batch, "discarded")
    run.assert_dead(app.import_batch, None)


def test_the_nightly_report_goes_from_stage_to_stage(app, work):
    app.shop.imported.update({1: 100, 2: 250})
    app.nightly_report("2024-05-01").run()
    work()
    assert list(app.gateway.sent.values()) == [("finance@example.com", "2024-05-01: 2 orders, 350 cents")]


def test_the_mix_that_produce_sends_ends_as_its_customers_say(app, work):
    produce = importlib.import_module("examples.orders.produce")
    assert produce.produce() == 10
    run = work()
    assert sorted(to for to, _ in app.gateway.sent.values()) == [
        "ada@example.com",
        "busy@example.com",
        "edsger@example.com",
        "finance@example.com",
        "flaky@example.com",
        "grace@example.com",
    ]
    assert len(app.shop.imported) == 1_000
    run.assert_dead(None, "exhausted")


@pytest.mark.parametrize(
    ("url", "kind"),
    [("redis://h:1/0", "RedisBroker"), ("amqp://h:1", "RabbitmqBroker"), ("stub://", "StubBroker")],
)
def test_the_url_chooses_the_broker(app, url, kind):
    assert type(app.make_broker(url)).__name__ == kind


def test_a_url_of_an_unknown_kind_names_the_expected_kinds(app):
    with pytest.raises(ValueError, match="expected redis://, amqp:// or stub://, got 'kafka://x'"):
        app.make_broker("kafka://x")


# --- where it can be seen -------------------------------------------------------------------------------------------


def test_numbers_and_bad_endings_go_where_the_environment_says(request, monkeypatch):
    server, transport = StatsdServer(), Captured()
    monkeypatch.setenv("STATSD_HOST", "127.0.0.1")
    monkeypatch.setenv("STATSD_PORT", str(server.port))
    monkeypatch.setenv("SENTRY_DSN", "http://key@127.0.0.1:1/1")
    init = functools.partial(sentry_sdk.init, transport=transport, auto_enabling_integrations=False)
    monkeypatch.setattr(sentry_sdk, "init", init)
    app = request.getfixturevalue("app_on_stub")
    try:
        app.send_confirmation.send(7, "nobody@example.com", "12.50 EUR")
        worker = Worker(app.broker, worker_threads=2, worker_timeout=10)
        worker.start()
        app.broker.join("orders_mail", timeout=10_000, fail_fast=False)
        worker.stop()
        names = set()
        while "jobs.send_confirmation.discard" not in names:
            # The queue's gauges come in between.
            names |= {line.partition(":")[0] for line in server.packet()}
        [event] = transport.events
        assert (event["tags"]["actor"], event["tags"]["outcome"]) == ("send_confirmation", "discarded")
        assert event["tags"]["team"] == "checkout"
    finally:
        server.close()
        sentry_sdk.get_client().close()
        sentry_sdk.get_global_scope().set_client(None)


def test_without_them_nothing_is_sent(app):
    kinds = {type(middleware) for middleware in app.broker.middleware}
    assert not kinds & {Metrics, SentryReporter}
