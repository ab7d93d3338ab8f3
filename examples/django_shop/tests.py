"""Run by Django's own test runner; see __init__.py."""

from __future__ import annotations

from unittest.mock import patch

import dramatiq
from django.db import transaction
from django.test import TestCase, TransactionTestCase
from dramatiq.middleware import Retries, TimeLimit

from dramatiq_policies import DiscardLogger, ErrorClassifier, Timeout
from dramatiq_policies.contrib.django import DjangoOutbox
from dramatiq_policies.testing import drain, fail

from . import mail
from .checkout import place_order
from .models import Order, Payment
from .tasks import book_payment, send_confirmation, send_receipt


def waiting() -> int:
    return dramatiq.get_broker().queues["mail"].qsize()


class SettingsTest(TestCase):
    def test_the_bundle_is_on_the_broker_by_dotted_path_and_by_instance(self) -> None:
        kinds = [type(middleware) for middleware in dramatiq.get_broker().middleware]
        for kind in (ErrorClassifier, Timeout, DiscardLogger, DjangoOutbox):
            assert kinds.count(kind) == 1
        assert Retries not in kinds
        assert TimeLimit not in kinds


class CheckoutTest(TestCase):
    """Tests inside of TestCase's atomic block. DjangoOutbox ignores the block."""

    def tearDown(self) -> None:
        dramatiq.get_broker().flush_all()

    def test_the_message_is_sent_when_the_order_is_committed(self) -> None:
        with self.captureOnCommitCallbacks(execute=True):
            place_order("ada@example.com")
            assert waiting() == 0
        assert waiting() == 1

    def test_an_order_that_is_rolled_back_sends_nothing(self) -> None:
        with self.captureOnCommitCallbacks(execute=True), transaction.atomic():
            place_order("ada@example.com")
            transaction.set_rollback(True)
        assert waiting() == 0


class JobTest(TransactionTestCase):
    """Tests with real commits."""

    def test_the_customer_is_told_once(self) -> None:
        order = place_order("ada@example.com")
        drain(dramatiq.get_broker()).assert_outcomes(send_confirmation, "succeeded")
        order.refresh_from_db()
        assert order.mails == 1

    def test_a_second_message_about_the_same_order_is_skipped(self) -> None:
        order = place_order("ada@example.com")
        send_confirmation.send(order.pk)
        drain(dramatiq.get_broker()).assert_outcomes(send_confirmation, "succeeded", "duplicate")
        order.refresh_from_db()
        assert order.mails == 1

    def test_an_address_that_is_refused_is_discarded_at_once(self) -> None:
        order = place_order("nobody@example.com")
        with fail(send_confirmation, mail.AddressRefused), self.assertLogs("dramatiq_policies.outcomes") as logs:
            run = drain(dramatiq.get_broker())
        run.assert_outcomes(send_confirmation, "discarded")
        assert logs.records
        order.refresh_from_db()
        assert order.mails == 0

    def test_an_order_that_does_not_exist_is_discarded_after_three_tries(self) -> None:
        send_confirmation.send(404)
        with self.assertLogs("dramatiq_policies.outcomes", "WARNING"):
            run = drain(dramatiq.get_broker())
        run.assert_outcomes(send_confirmation, "retried", "retried", "discarded")


class PaymentTest(TransactionTestCase):
    """A transactional job commits the effect, the key and the messages together."""

    def setUp(self) -> None:
        self.order = Order.objects.create(email="ada@example.com")

    def test_a_transfer_is_booked_once_however_often_it_is_reported(self) -> None:
        for _ in range(3):
            book_payment.send("T1", self.order.pk, 4200)
        run = drain(dramatiq.get_broker())
        run.assert_outcomes(book_payment, "succeeded", "duplicate", "duplicate")
        run.assert_outcomes(send_receipt, "succeeded")
        assert Payment.objects.count() == 1

    def test_a_failed_booking_leaves_nothing_and_is_tried_again(self) -> None:
        book_payment.send("T2", self.order.pk, 4200)
        # The first run creates the payment, and then fails.
        fails_once = patch.object(send_receipt, "send", side_effect=[Order.DoesNotExist, None])
        with fails_once, self.assertLogs("dramatiq_policies.outcomes", "WARNING"):
            run = drain(dramatiq.get_broker())
        run.assert_outcomes(book_payment, "retried", "succeeded")
        assert Payment.objects.count() == 1
