"""The test kit on Django: crashes of jobs in and beside transactions, in a TransactionTestCase and in a TestCase."""

from __future__ import annotations

import dramatiq
import pytest
from django.db import transaction
from django.test import TestCase, TransactionTestCase

from dramatiq_policies.testing import StubBrokerMixin, assert_crash_safe, crash, drain, enqueue_down

from . import project
from .shop.models import Order
from .transactional_jobs import Shop


class Orders(Shop):
    """An application whose jobs place an order and tell of it."""

    def __init__(self, alias="default", *, transactional=True):
        super().__init__(alias)

        def place(email):
            with transaction.atomic(using=alias):
                # No constraint: a second run is seen.
                Order.objects.using(alias).create(email=f"{email} {Order.objects.using(alias).count()}")
                self.tell.send(email)

        self.place = self.actor(place, transactional=transactional, max_retries=0)

    def effects(self):
        return self.orders(), sorted(self.told)

    def reset(self):
        self.told.clear()
        Order.objects.using(self.alias).all().delete()

    def assert_crash_safe(self):
        assert_crash_safe(self.place, "ada", effects=self.effects, reset=self.reset)


@pytest.fixture
def orders(request, monkeypatch):
    project.make_tables()
    orders = Orders(**getattr(request, "param", {}))
    monkeypatch.setattr(dramatiq.broker, "global_broker", orders.broker)
    yield orders
    orders.reset()
    orders.close()


def cases_of(test):
    """A case of each kind with one test; the flush of the first would not find the tables of other apps."""

    class WithCommits(StubBrokerMixin, TransactionTestCase):
        available_apps = ()

        def _fixture_teardown(self):
            pass

        def test(self):
            test(self)

    class InATransaction(StubBrokerMixin, TestCase):
        def test(self):
            test(self)

    return [WithCommits, InATransaction]


def test_a_transactional_job_is_crash_safe_in_a_transaction_test_case_and_in_a_test_case(orders):
    for case in cases_of(lambda self: orders.assert_crash_safe()):
        project.run_case(case)
    assert orders.pending() == 0


@pytest.mark.parametrize("orders", [{"transactional": False}], indirect=True)
def test_a_job_without_its_transaction_is_not_crash_safe(orders):
    def test(self):
        with pytest.raises(AssertionError, match="place is not crash-safe"):
            orders.assert_crash_safe()

    project.run_case(cases_of(test)[0])


@pytest.mark.parametrize("orders", [{"transactional": False}], indirect=True)
def test_a_crash_leaves_no_block_of_the_dead_worker_open(orders):
    def test(self):
        with pytest.raises(AssertionError, match="place is not crash-safe"):
            orders.assert_crash_safe()
        assert self.blocks() == self.before

    for case in cases_of(test):
        case.blocks = lambda self: len(transaction.get_connection().atomic_blocks)
        case.setUp = lambda self, up=case.setUp: (up(self), setattr(self, "before", self.blocks()))
        project.run_case(case)


def test_a_drain_runs_the_messages_that_a_test_case_commits_and_captures(orders):
    def test(self):
        with self.captureOnCommitCallbacks(execute=True), transaction.atomic():
            orders.tell.send("ada")
        self.drain().assert_outcomes(orders.tell, "succeeded")
        with pytest.raises(ZeroDivisionError), self.captureOnCommitCallbacks(execute=True), transaction.atomic():
            orders.tell.send("undone")
            raise ZeroDivisionError
        assert self.drain().events == []

    project.run_case(cases_of(test)[1])
    assert orders.told == [("ada",)]


def test_with_the_broker_down_a_commit_succeeds_and_a_drain_publishes_later(orders):
    with enqueue_down(orders.broker), transaction.atomic():
        orders.tell.send("ada")
    assert (orders.told, orders.pending()) == ([], 1)
    drain(orders.broker).assert_outcomes(orders.tell, "succeeded")
    assert orders.pending() == 0


def test_a_worker_that_dies_in_a_transactional_job_leaves_nothing_of_it(orders):
    orders.place.send("ada")
    with crash(orders.place, after_effect=True):
        run = drain(orders.broker)
    run.assert_outcomes(orders.place, "succeeded")
    assert orders.effects() == (["ada 0"], [("ada",)])
