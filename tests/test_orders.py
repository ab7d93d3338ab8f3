"""What the jobs of examples/orders must do: written before them, and run by a real worker on a StubBroker."""

from __future__ import annotations

import functools
import importlib
import logging
import sys

import dramatiq.broker
import pytest
import sentry_sdk
from dramatiq import Worker

from dramatiq_policies import Metrics, SentryReporter

from .support import Captured, StatsdServer


@pytest.fixture
def app(monkeypatch):
    """The app as `dramatiq examples.orders.app` imports it, on a broker of its own, with waits of a few ms."""
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)
    monkeypatch.setenv("BROKER_URL", "stub://")
    monkeypatch.setenv("ORDERS_WAIT_MS", "10")
    monkeypatch.setenv("ORDERS_TIMEOUT_MS", "400")
    forget_app()
    module = importlib.import_module("examples.orders.app")
    module.gateway.retry_after = 0.01
    yield module
    module.broker.close()
    module.shop.uncommitted.clear()
    module.shop.imported.clear()
    forget_app()


def forget_app():
    for name in ("app", "produce"):
        sys.modules.pop(f"examples.orders.{name}", None)


@pytest.fixture
def ends(app, caplog):
    """What the log says of each delivery, as (outcome, reason); successes are not logged, they are in what was done."""
    caplog.set_level(logging.INFO, logger="dramatiq_policies")

    def read(actor):
        return [
            (record.outcome, record.reason)
            for record in caplog.records
            if hasattr(record, "outcome") and record.actor == actor.actor_name
        ]

    return read


def work(app):
    """Run all that is queued, to its end."""
    worker = Worker(app.broker, worker_threads=2, worker_timeout=10)
    worker.start()
    try:
        for queue in app.broker.queues.copy():
            app.broker.join(queue, timeout=10_000, fail_fast=False)
    finally:
        worker.stop()


def why_dead(app):
    return [
        (message.actor_name, message.options["failure"]["outcome"], message.options["failure"]["reason"])
        for message in app.broker.dead_letters
    ]


def test_a_confirmation_is_sent(app, ends):
    app.send_confirmation.send(7, "ada@example.com", "12.50 EUR")
    work(app)
    assert app.gateway.sent == {"order-confirmation:7": ("ada@example.com", "Order 7: 12.50 EUR")}
    assert ends(app.send_confirmation) == []
    assert why_dead(app) == []


def test_a_confirmation_whose_message_is_delivered_twice_runs_once(app, ends):
    message = app.send_confirmation.send(7, "ada@example.com", "12.50 EUR")
    app.broker.enqueue(message)
    work(app)
    assert app.gateway.asked == {"order-confirmation:7": 1}
    assert ends(app.send_confirmation)[-1] == ("duplicate", "completed")


def test_two_messages_for_one_order_are_one_mail(app):
    app.send_confirmation.send(7, "ada@example.com", "12.50 EUR")
    app.send_confirmation.send(7, "ada@example.com", "12.50 EUR")
    work(app)
    assert app.gateway.asked == {"order-confirmation:7": 1}


def test_a_gateway_that_times_out_is_asked_again_under_the_same_key(app, ends):
    app.send_confirmation.send(7, "flaky@example.com", "12.50 EUR")
    work(app)
    assert app.gateway.asked == {"order-confirmation:7": 2}
    assert len(app.gateway.sent) == 1
    assert ends(app.send_confirmation) == [("retried", None)]


def test_a_gateway_that_is_down_ends_in_the_dead_letters_after_five_attempts(app, ends):
    app.send_confirmation.send(7, "down@example.com", "12.50 EUR")
    work(app)
    assert ends(app.send_confirmation) == [("retried", None)] * 4 + [("dead", "exhausted")]
    (letter,) = app.broker.dead_letters
    failure = letter.options["failure"]
    assert failure["exception"] == "examples.orders.gateway.EmailTimeout"
    assert failure["attempts"] == 5
    assert len(failure["history"]) == 5


def test_a_gateway_that_limits_its_rate_is_asked_again_when_it_says(app, ends):
    app.send_confirmation.send(7, "busy@example.com", "12.50 EUR")
    work(app)
    assert len(app.gateway.sent) == 1
    assert ends(app.send_confirmation) == [("retried", None)]


def test_an_address_that_is_rejected_is_discarded_and_logged(app, ends):
    app.send_confirmation.send(7, "nobody@example.com", "12.50 EUR")
    work(app)
    assert ends(app.send_confirmation) == [("discarded", None)]
    assert app.gateway.sent == {}
    assert why_dead(app) == []


def test_an_order_that_is_not_committed_yet_is_waited_for(app, ends, monkeypatch):
    shop, find_order = app.shop, app.shop.find_order
    shop.uncommitted.add(7)

    def commit_later(order_id):
        try:
            return find_order(order_id)
        finally:
            shop.uncommitted.discard(order_id)

    monkeypatch.setattr(shop, "find_order", commit_later)
    app.send_confirmation.send(7, "ada@example.com", "12.50 EUR")
    work(app)
    assert ends(app.send_confirmation) == [("retried", None)]
    assert len(app.gateway.sent) == 1


def test_an_order_that_never_existed_is_discarded_after_three_tries(app, ends):
    app.send_confirmation.send(app.shop.FIRST_UNKNOWN, "ada@example.com", "12.50 EUR")
    work(app)
    assert ends(app.send_confirmation) == [("retried", None)] * 2 + [("discarded", "exhausted")]
    assert app.gateway.sent == {}


def test_a_missing_api_key_alerts_at_once_and_keeps_the_mail_for_a_replay(app, ends, caplog):
    app.gateway.api_key = None
    app.send_confirmation.send(7, "ada@example.com", "12.50 EUR")
    work(app)
    assert ends(app.send_confirmation) == [("alerted", None)]
    (alert,) = [record for record in caplog.records if record.name == "dramatiq_policies.alerts"]
    assert alert.levelno == logging.CRITICAL
    assert alert.tags == {"team": "checkout", "criticality": "high"}
    assert why_dead(app) == [("send_confirmation", "alerted", None)]


def test_a_gateway_that_hangs_is_left_at_the_timeout_and_asked_once_more(app, ends):
    app.send_confirmation.send(7, "hang@example.com", "12.50 EUR")
    work(app)
    assert ends(app.send_confirmation) == [("retried", None), ("dead", "exhausted")]
    (letter,) = app.broker.dead_letters
    assert letter.options["failure"]["exception"] == "dramatiq_policies.errors.TimeoutExceeded"


def test_the_gateway_gets_no_more_time_than_the_job_has_left(app):
    app.send_confirmation.send(7, "ada@example.com", "12.50 EUR")
    work(app)
    (timeout_ms,) = app.gateway.timeouts
    assert 0 < timeout_ms <= 400


def test_a_confirmation_called_directly_needs_no_worker(app):
    app.send_confirmation(7, "ada@example.com", "12.50 EUR")
    assert list(app.gateway.sent) == ["order-confirmation:7"]


def test_an_import_is_cut_into_batches_and_run_twice_writes_the_same(app, ends):
    app.import_orders.send(1, 250)
    app.import_orders.send(1, 250)
    work(app)
    assert sorted(app.shop.imported) == list(range(1, 251))
    assert ends(app.import_batch) == []


def test_a_batch_with_a_bad_row_is_kept_for_a_look(app, ends):
    app.import_batch.send(-2_000, -1_999)
    work(app)
    assert ends(app.import_batch) == [("discarded", None)]
    assert why_dead(app) == [("import_batch", "discarded", None)]


def test_the_nightly_report_goes_from_stage_to_stage(app):
    app.shop.imported.update({1: 100, 2: 250})
    app.nightly_report("2024-05-01").run()
    work(app)
    assert list(app.gateway.sent.values()) == [("finance@example.com", "2024-05-01: 2 orders, 350 cents")]


def test_the_mix_that_produce_sends_ends_as_its_customers_say(app, ends):
    produce = importlib.import_module("examples.orders.produce")
    assert produce.produce() == 10
    work(app)
    assert sorted(to for to, _ in app.gateway.sent.values()) == [
        "ada@example.com",
        "busy@example.com",
        "edsger@example.com",
        "finance@example.com",
        "flaky@example.com",
        "grace@example.com",
    ]
    assert len(app.shop.imported) == 1_000
    assert why_dead(app) == [("send_confirmation", "dead", "exhausted")]


@pytest.mark.parametrize(
    ("url", "kind"),
    [("redis://h:1/0", "RedisBroker"), ("amqp://h:1", "RabbitmqBroker"), ("stub://", "StubBroker")],
)
def test_the_url_chooses_the_broker(app, url, kind):
    assert type(app.make_broker(url)).__name__ == kind


def test_a_url_that_chooses_none_says_what_was_expected(app):
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
    app = request.getfixturevalue("app")
    try:
        app.send_confirmation.send(7, "nobody@example.com", "12.50 EUR")
        work(app)
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
