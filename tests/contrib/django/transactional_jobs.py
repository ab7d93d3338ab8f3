"""Transactional jobs with Django's ORM, on a StubBroker and any database."""

from __future__ import annotations

import time
from contextlib import suppress

import dramatiq
import pytest
from django.db import DatabaseError, IntegrityError, OperationalError, connections, transaction
from dramatiq import Message, pipeline
from dramatiq.brokers.stub import StubBroker

from dramatiq_policies import (
    ConfigurationError,
    Discard,
    ErrorClassifier,
    Idempotency,
    RetryPolicy,
    Snooze,
    TimeoutExceeded,
    constant,
    current_job,
    install,
)
from dramatiq_policies.contrib.django import DjangoOutbox, DjangoStore
from dramatiq_policies.contrib.django.database import DjangoConnection
from dramatiq_policies.testing import assert_crash_safe, drain

from . import project
from .shop.models import Order

ONCE = RetryPolicy(attempts=1)
TWICE = RetryPolicy(attempts=2, wait=constant(1))


class Shop:
    """An application whose jobs place orders in a database."""

    def __init__(self, alias):
        self.alias = alias
        self.store, self.outbox = DjangoStore(alias), DjangoOutbox(alias)
        self.idempotency = Idempotency(self.store)
        self.events = []
        self.broker = StubBroker(middleware=[*StubBroker().middleware, project.DbConnectionsMiddleware()])
        install(
            self.broker,
            outbox=self.outbox,
            idempotency=self.idempotency,
            error_classifier=ErrorClassifier(unclassified=ONCE, on_outcome=self.events.append),
        )
        self.told = []
        self.tell = dramatiq.actor(self._tell, broker=self.broker, actor_name="tell", queue_name="mail")

    def _tell(self, *args):
        self.told.append(args)

    def actor(self, body, **options):
        options = {"transactional": True, "idempotency_key": "{email}", **options}
        return dramatiq.actor(body, broker=self.broker, actor_name="place", **options)

    def create(self, email):
        return Order.objects.using(self.alias).create(email=email)

    def orders(self):
        return sorted(order.email for order in Order.objects.using(self.alias).all())

    def drain(self):
        return drain(self.broker)

    def outcomes(self):
        return [(event.outcome.value, event.reason) for event in self.events if event.actor == "place"]

    def pending(self):
        return self.outbox.database.run(self.outbox.rows.stats).pending

    def queued(self):
        return [Message.decode(body).args for body in self.broker.queues["mail"].queue]

    def take_over(self):
        """Write the claim of another process over the running job's, as if its lease had ended. Before the job writes."""
        (claim,) = self.idempotency.claims.leases._held.values()
        theirs = claim.record._replace(owner="elsewhere:1:place:1", token="1").encode()
        connection = connections[self.alias]
        if connection.vendor == "sqlite":
            # Nobody else can write meanwhile.
            assert self.store.swap_within(DjangoConnection(connection), claim.name, claim.value, theirs, 10**9)
        else:
            assert self.store.swap(claim.name, claim.value, theirs, 10**9) is None

    def close(self):
        self.idempotency.claims.close()
        self.store.database.close()
        self.outbox.database.close()
        connections[self.alias].close()


class TransactionalJobs:
    """Runs on each database; a subclass has the fixture ``alias``."""

    @pytest.fixture
    def shop(self, alias):
        project.make_tables(alias)
        shop = Shop(alias)
        yield shop
        shop.close()

    def test_the_effect_the_completion_and_the_messages_are_there_together(self, shop):
        def place(email):
            assert current_job().session is None
            shop.create(email)
            shop.tell.send(email)
            assert shop.queued() == []

        actor = shop.actor(place)
        actor.send("ada")
        shop.drain()
        assert (shop.orders(), shop.told) == (["ada"], [("ada",)])
        assert Idempotency.state(actor, "ada").state == "completed"
        assert shop.outcomes() == [("succeeded", None)]
        assert shop.pending() == 0

    def test_an_error_leaves_nothing(self, shop):
        def place(email):
            shop.create(email)
            shop.tell.send(email)
            raise RuntimeError

        actor = shop.actor(place)
        actor.send("ada")
        shop.drain()
        assert (shop.orders(), shop.told, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("dead", "exhausted")]
        assert Idempotency.state(actor, "ada").state == "none"

    def test_a_failed_run_is_retried_in_a_new_transaction(self, shop):
        def place(email):
            shop.create(email)
            shop.tell.send(current_job().attempt)
            if current_job().attempt == 1:
                shop.create(email)

        shop.actor(place, retry_on={IntegrityError: TWICE}).send("ada")
        shop.drain()
        assert (shop.orders(), shop.told) == (["ada"], [(2,)])
        assert shop.outcomes() == [("retried", None), ("succeeded", None)]

    @pytest.mark.parametrize(
        ("error", "outcome"), [(Discard(), ("discarded", None)), (Snooze(1_000), ("deferred", "snoozed"))]
    )
    def test_a_verdict_rolls_back(self, shop, error, outcome):
        runs = []

        def place(email):
            runs.append(email)
            shop.create(email)
            if len(runs) == 1:
                raise error

        shop.actor(place).send("ada")
        shop.drain()
        assert shop.outcomes()[0] == outcome
        assert shop.orders() == ([] if len(runs) == 1 else ["ada"])

    def test_savepoints_of_the_job_count(self, shop):
        def place(email):
            shop.create(email)
            with suppress(KeyError), transaction.atomic(using=shop.alias):
                shop.create("undone")
                shop.tell.send("undone")
                raise KeyError
            with transaction.atomic(using=shop.alias):
                shop.tell.send("kept")

        shop.actor(place).send("ada")
        shop.drain()
        assert (shop.orders(), shop.told) == (["ada"], [("kept",)])

    def test_a_pipeline_goes_on_with_the_transaction(self, shop):
        def place(email):
            shop.create(email)
            return "placed"

        actor = shop.actor(place)
        pipeline([actor.message("ada"), shop.tell.message("next")], broker=shop.broker).run()
        shop.drain()
        assert shop.told == [("next", "placed")]
        assert shop.pending() == 0

    def test_a_duplicate_is_skipped(self, shop):
        actor = shop.actor(shop.create)
        actor.send("ada")
        actor.send("ada")
        shop.drain()
        assert shop.orders() == ["ada"]
        assert shop.outcomes() == [("succeeded", None), ("duplicate", "completed")]

    def test_a_run_whose_key_was_taken_over_leaves_nothing_and_is_stale(self, shop):
        def place(email):
            shop.take_over()
            shop.create(email)
            shop.tell.send(email)

        shop.actor(place).send("ada")
        shop.drain()
        assert (shop.orders(), shop.told, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("duplicate", "stale")]

    @pytest.mark.parametrize("swallowed", [False, True])
    @pytest.mark.parametrize(
        "by",
        [
            transaction.commit,
            transaction.rollback,
            lambda using: transaction.set_autocommit(True, using=using),
            lambda using: connections[using].close(),
        ],
        ids=["commit", "rollback", "set_autocommit", "close"],
    )
    def test_a_job_that_ends_its_transaction_itself_is_refused_and_leaves_nothing(self, shop, by, swallowed):
        def place(email):
            shop.create(email)
            shop.tell.send(email)
            with suppress(*[ConfigurationError] * swallowed):
                by(using=shop.alias)

        shop.actor(place).send("ada")
        shop.drain()
        assert (shop.orders(), shop.told, shop.pending()) == ([], [], 0)
        assert shop.outcomes() == [("dead", "exhausted")]
        assert isinstance(shop.events[-1].exception, ConfigurationError)

    def test_a_block_that_the_job_leaves_open_is_refused_and_the_next_job_has_a_connection(self, shop):
        def place(email):
            shop.create(email)
            if email == "ada":
                transaction.atomic(using=shop.alias).__enter__()

        actor = shop.actor(place)
        actor.send("ada")
        actor.send("bob")
        shop.drain()
        assert shop.orders() == ["bob"]
        assert shop.outcomes() == [("dead", "exhausted"), ("succeeded", None)]

    def test_a_job_that_marks_its_transaction_for_a_rollback_fails(self, shop):
        def place(email):
            shop.create(email)
            transaction.set_rollback(True, using=shop.alias)

        shop.actor(place).send("ada")
        shop.drain()
        assert shop.orders() == []
        assert shop.outcomes() == [("dead", "exhausted")]

    def test_callbacks_run_after_the_commit_and_their_errors_change_nothing(self, shop, caplog):
        seen = []

        def place(email):
            shop.create(email)
            transaction.on_commit(lambda: seen.append(shop.orders()), using=shop.alias)
            transaction.on_commit(lambda: 1 / 0, using=shop.alias)
            shop.tell.send(email)

        shop.actor(place).send("ada")
        shop.drain()
        assert seen == [["ada"]]
        assert shop.told == [("ada",)]
        assert shop.outcomes() == [("succeeded", None)]
        assert "The job has committed and succeeded" in caplog.text

    def test_a_transactional_job_is_crash_safe_and_a_plain_one_is_not(self, shop):
        def place(email):
            shop.create(email)
            shop.tell.send(email)
            shop.create(f"{email} once more")

        def effects():
            return shop.orders(), sorted(shop.told)

        def reset():
            Order.objects.using(shop.alias).all().delete()
            shop.told.clear()

        assert_crash_safe(shop.actor(place), "ada", effects=effects, reset=reset)
        unsafe = dramatiq.actor(place, broker=shop.broker, actor_name="unsafe", idempotency_key="{email}")
        with pytest.raises(AssertionError, match="not crash-safe"):
            assert_crash_safe(unsafe, "ada", effects=effects, reset=reset)

    @pytest.mark.parametrize("after", [False, True])
    def test_a_connection_lost_at_the_commit(self, shop, monkeypatch, after):
        """Before the COMMIT the job fails; after it only the reply is lost, and the job has succeeded."""

        def place(email):
            shop.create(email)
            shop.tell.send(email)
            connection = connections[shop.alias]
            commit = connection._commit

            def lose():
                if after:
                    commit()
                connection.connection.close()
                raise OperationalError("lost")

            monkeypatch.setattr(connection, "_commit", lose)

        actor = shop.actor(place)
        actor.send("ada")
        shop.drain()
        if not after:
            assert (shop.orders(), shop.told, shop.outcomes()) == ([], [], [("dead", "exhausted")])
            return
        assert (shop.orders(), shop.outcomes()) == (["ada"], [("succeeded", None)])
        assert Idempotency.state(actor, "ada").state == "completed"
        # The callbacks of the commit did not run: the relay publishes.
        assert shop.pending() == 1

    @pytest.mark.parametrize("swallowed", [False, True])
    def test_an_interrupt_rolls_back_and_its_connection_is_not_used_again(self, shop, swallowed):
        used = []

        def place(email):
            used.append(connections[shop.alias])
            shop.create(email)
            shop.tell.send(email)
            if email == "ada":
                try:
                    spin_for_ever()
                except TimeoutExceeded:
                    if not swallowed:
                        raise

        actor = shop.actor(place, timeout=1_500)
        actor.send("ada")
        actor.send("bob")
        worker = dramatiq.Worker(shop.broker, worker_timeout=10, worker_threads=1)
        worker.start()
        try:
            shop.broker.join("default", fail_fast=False, timeout=30_000)
            shop.broker.join("mail", fail_fast=False, timeout=30_000)
        finally:
            worker.stop()
        assert (shop.orders(), shop.told) == (["bob"], [("bob",)])
        assert shop.outcomes() == [("dead", "exhausted"), ("succeeded", None)]
        assert used[0] is not used[1]

    def test_a_job_within_a_foreign_transaction_is_refused(self, shop):
        shop.actor(shop.create).send("ada")
        with transaction.atomic(using=shop.alias):
            shop.drain()
        assert shop.orders() == []
        assert "begins inside of a transaction" in str(shop.events[-1].exception)

    def test_an_error_of_the_orm_that_the_job_has_caught_without_a_savepoint_fails_the_job(self, shop):
        def place(email):
            shop.create(email)
            with suppress(DatabaseError):
                shop.create(email)

        shop.actor(place).send("ada")
        shop.drain()
        assert shop.orders() == []
        assert shop.outcomes() == [("dead", "exhausted")]


def spin_for_ever():
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        pass
