"""Run by Django's own test runner; see __init__.py."""

from __future__ import annotations

import re

import dramatiq
import pytest
from django.test import TestCase, TransactionTestCase
from dramatiq.middleware import Retries, TimeLimit

from dramatiq_policies import DiscardLogger, ErrorClassifier, Timeout
from dramatiq_policies.contrib.django import SentInsideAtomic, WarnInsideAtomic
from dramatiq_policies.testing import drain, fail

from . import mail
from .checkout import place_order, place_order_too_early
from .models import Order
from .tasks import send_confirmation


def work() -> None:
    broker = dramatiq.get_broker()
    worker = dramatiq.Worker(broker, worker_timeout=10, worker_threads=1)
    worker.start()
    try:
        broker.join("mail", fail_fast=False, timeout=10_000)
    finally:
        worker.stop()


def waiting() -> int:
    return dramatiq.get_broker().queues["mail"].qsize()


class SettingsTest(TestCase):
    def test_the_bundle_is_on_the_broker_by_dotted_path_and_by_instance(self) -> None:
        kinds = [type(middleware) for middleware in dramatiq.get_broker().middleware]
        for kind in (ErrorClassifier, Timeout, DiscardLogger, WarnInsideAtomic):
            assert kinds.count(kind) == 1
        assert Retries not in kinds
        assert TimeLimit not in kinds


class CheckoutTest(TestCase):
    """Tests inside TestCase's own atomic block, which does not count."""

    def tearDown(self) -> None:
        dramatiq.get_broker().flush_all()

    def test_the_message_is_sent_when_the_order_is_committed(self) -> None:
        with self.assertNoLogs("dramatiq_policies.django"), self.captureOnCommitCallbacks(execute=True):
            place_order("ada@example.com")
            assert waiting() == 0
        assert waiting() == 1

    def test_sending_inside_atomic_is_warned_of_once_with_the_line_that_does(self) -> None:
        with self.assertLogs("dramatiq_policies.django", "WARNING") as logs:
            place_order_too_early("ada@example.com")
            place_order_too_early("bob@example.com")
        (record,) = logs.records
        assert record.actor == "send_confirmation"
        assert re.search(r"checkout\.py:\d+$", record.call_site)
        assert record.call_site in record.getMessage()
        assert waiting() == 2

    def test_strict_sends_nothing_and_raises(self) -> None:
        (middleware,) = (m for m in dramatiq.get_broker().middleware if isinstance(m, WarnInsideAtomic))
        middleware.strict = True
        self.addCleanup(setattr, middleware, "strict", False)
        with pytest.raises(SentInsideAtomic):
            place_order_too_early("ada@example.com")
        assert waiting() == 0


class JobTest(TransactionTestCase):
    """Tests with real commits, visible to the worker's thread."""

    def test_the_customer_is_told_once(self) -> None:
        order = place_order("ada@example.com")
        work()
        order.refresh_from_db()
        assert order.mails == 1

    def test_a_second_message_about_the_same_order_is_skipped(self) -> None:
        order = place_order("ada@example.com")
        send_confirmation.send(order.pk)
        with self.assertLogs("dramatiq_policies.outcomes", "INFO") as logs:
            work()
        order.refresh_from_db()
        assert order.mails == 1
        assert "duplicate" in [getattr(record, "outcome", None) for record in logs.records]

    def test_an_address_that_is_refused_is_discarded_at_once(self) -> None:
        order = place_order("nobody@example.com")
        with fail(send_confirmation, mail.AddressRefused), self.assertLogs("dramatiq_policies.outcomes") as logs:
            run = drain(dramatiq.get_broker())
        run.assert_outcomes(send_confirmation, "discarded")
        assert logs.records
        order.refresh_from_db()
        assert order.mails == 0

    def test_an_order_that_is_never_committed_is_discarded_after_three_tries(self) -> None:
        send_confirmation.send(404)
        with self.assertLogs("dramatiq_policies.outcomes", "WARNING") as logs:
            work()
        ends = [(record.outcome, record.reason) for record in logs.records if hasattr(record, "outcome")]
        assert ends == [("retried", None), ("retried", None), ("discarded", "exhausted")]
        assert Order.objects.count() == 0
